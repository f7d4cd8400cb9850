{{/* Pieces of pods. */}}

{{/* Fits the restricted Pod Security Standard. (dict "user" UID). */}}
{{- define "kvservice.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kvservice.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kvservice.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Where the pods of a table run that has these four. */}}
{{- define "kvservice.placing" -}}
{{- $found := dict -}}
{{- range $name, $value := pick . "priorityClassName" "nodeSelector" "tolerations" "affinity" -}}
{{- if $value }}{{ $_ := set $found $name $value }}{{ end -}}
{{- end -}}
{{- if $found }}{{ toYaml $found }}{{ end -}}
{{- end }}

{{/* Spread over nodes: (dict "root" $ "component" NAME "constraints" LIST). */}}
{{- define "kvservice.spread" -}}
topologySpreadConstraints:
{{- with .constraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "kvservice.componentLabels" . | nindent 8 }}
{{- end }}
{{- end }}

{{/* The state Redis, as the program reads it. Passwords stay in their Secret. */}}
{{- define "kvservice.stateEnv" -}}
{{- if .Values.redis.state.enabled -}}
- name: STATE_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "kvservice.redisSecretName" . }}, key: state}}
- name: KVSERVICE_STATE_URL
  value: redis://:$(STATE_PASSWORD)@{{ include "kvservice.fullname" . }}-state:{{ include "kvservice.ports.redis" . }}/0
{{- else -}}
- name: KVSERVICE_STATE_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.state.external.existingSecret }}, key: {{ .Values.redis.state.external.key }}}}
{{- end -}}
{{- end }}

{{- define "kvservice.kvEnv" -}}
{{- if .Values.redis.kv.enabled -}}
- name: KV_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "kvservice.redisSecretName" . }}, key: kv}}
- name: KVSERVICE_REDIS_URL
  value: redis://:$(KV_PASSWORD)@{{ include "kvservice.fullname" . }}-kv:{{ include "kvservice.ports.redis" . }}/0
{{- else if .Values.redis.kv.external.existingSecret -}}
- name: KVSERVICE_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.kv.external.existingSecret }}, key: {{ .Values.redis.kv.external.key }}}}
{{- end -}}
{{- end }}

{{/* Certificates for gateways and workers among themselves: (dict "root" $ "side" gateway|worker). */}}
{{- define "kvservice.internalTlsVolume" -}}
- name: internal-tls
  secret:
    secretName: {{ include "kvservice.internalTlsSecretName" . }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
{{- if get .root.Values.internalTls (printf "%sSecret" .side) }}
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- else }}
      - {key: {{ .side }}.crt, path: tls.crt}
      - {key: {{ .side }}.key, path: tls.key}
{{- end }}
{{- end }}

{{- define "kvservice.redisCaVolume" -}}
{{- with .Values.redis.caSecret -}}
- name: redis-ca
  secret: {secretName: {{ . }}, defaultMode: 0440, items: [{key: ca.crt, path: ca.crt}]}
{{- end -}}
{{- end }}

{{- define "kvservice.redisCaMount" -}}
{{- if .Values.redis.caSecret -}}
- {name: redis-ca, mountPath: /etc/kvservice/redis-ca, readOnly: true}
{{- end -}}
{{- end }}
