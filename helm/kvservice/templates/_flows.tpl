{{/* Pieces of NetworkPolicies. */}}

{{/* Pods of a component of this release, as a peer: (dict "root" $ "component" NAME). */}}
{{- define "kvservice.peer" -}}
- podSelector:
    matchLabels:
      {{- include "kvservice.componentLabels" . | nindent 6 }}
{{- end }}

{{- define "kvservice.workerPeer" -}}
- podSelector:
    matchLabels:
      {{- include "kvservice.workerLabels" . | nindent 6 }}
{{- end }}

{{/* All workers, whatever their model. */}}
{{- define "kvservice.workerLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
kvservice/role: worker
{{- end }}

{{/* Head and workers. */}}
{{- define "kvservice.rayPeers" -}}
{{ include "kvservice.peer" (dict "root" . "component" "ray-head") }}
{{ include "kvservice.workerPeer" . }}
{{- end }}

{{/* The way to a Redis, bundled or not: (dict "root" $ "role" NAME). Nothing where there is none. */}}
{{- define "kvservice.redisEgress" -}}
{{- $table := get .root.Values.redis .role -}}
{{- if $table.enabled -}}
- to:
    {{- include "kvservice.peer" (dict "root" .root "component" .role) | nindent 4 }}
  ports: [{protocol: TCP, port: {{ include "kvservice.ports.redis" .root }}}]
{{- else if or $table.external.existingSecret $table.external.address -}}
- to:
    {{- range $table.external.cidrs }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
  ports: [{protocol: TCP, port: {{ $table.external.port }}}]
{{- end -}}
{{- end }}

{{/* The way to the collector of traces. */}}
{{- define "kvservice.tracesEgress" -}}
{{- $url := .Values.config.telemetry.traces | default "" -}}
{{- if hasPrefix "http" $url -}}
{{- $port := regexFind ":[0-9]+" (regexReplaceAll "^https?://" $url "") | trimPrefix ":" | default "4317" -}}
- to:
    {{- toYaml .Values.networkPolicy.traces | nindent 4 }}
  ports: [{protocol: TCP, port: {{ $port }}}]
{{- end -}}
{{- end }}
