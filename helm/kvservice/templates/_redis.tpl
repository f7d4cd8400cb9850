{{/* The bundled Redis servers. Each role has objects of its own; no two share an instance. (dict "root" $ "role" NAME). */}}

{{- define "kvservice.redisName" -}}
{{ include "kvservice.fullname" .root }}-{{ .role }}
{{- end }}

{{- define "kvservice.redisMeta" -}}
metadata:
  name: {{ include "kvservice.redisName" . }}
  labels:
    {{- include "kvservice.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
{{- end }}

{{/* The settings that each role needs, as `kvservice serve` gives them to servers of its own. */}}
{{- define "kvservice.redisConf" -}}
dir /data
port {{ include "kvservice.ports.redis" .root }}
save ""
maxmemory {{ include "kvservice.bytes" (get .root.Values.redis .role).maxmemory }}
{{- if eq .role "kv" }}
maxmemory-policy allkeys-lru
appendonly no
{{- else }}
maxmemory-policy noeviction
appendonly yes
appendfsync {{ ternary "always" "everysec" (eq .role "state") }}
no-appendfsync-on-rewrite no
{{- end }}
{{- end }}

{{- define "kvservice.redisConfigMap" -}}
apiVersion: v1
kind: ConfigMap
{{ include "kvservice.redisMeta" . }}
data:
  redis.conf: |
    {{- include "kvservice.redisConf" . | nindent 4 }}
{{- end }}

{{- define "kvservice.redisService" -}}
apiVersion: v1
kind: Service
{{ include "kvservice.redisMeta" . }}
spec:
  selector:
    {{- include "kvservice.componentLabels" (dict "root" .root "component" .role) | nindent 4 }}
  ports:
    - {name: redis, port: {{ include "kvservice.ports.redis" .root }}, targetPort: redis}
{{- end }}

{{/* One server has no second that could take over: whoever evicts it says so first. `kv` may go at any time. */}}
{{- define "kvservice.redisPdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
{{ include "kvservice.redisMeta" . }}
spec:
  maxUnavailable: {{ ternary 1 0 (eq .role "kv") }}
  selector:
    matchLabels:
      {{- include "kvservice.componentLabels" (dict "root" .root "component" .role) | nindent 6 }}
{{- end }}

{{- define "kvservice.redisStatefulSet" -}}
{{- $root := .root -}}
{{- $table := get $root.Values.redis .role -}}
{{- $bytes := include "kvservice.bytes" $table.maxmemory | int64 -}}
{{/* Beside its data: clients' buffers, and while a file is rewritten what changes meanwhile. */}}
{{- $memory := add $bytes (div $bytes 4) 134217728 -}}
apiVersion: apps/v1
kind: StatefulSet
{{ include "kvservice.redisMeta" . }}
spec:
  serviceName: {{ include "kvservice.redisName" . }}
  replicas: 1
  selector:
    matchLabels:
      {{- include "kvservice.componentLabels" (dict "root" $root "component" .role) | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "kvservice.podLabels" (dict "root" $root "component" .role) | nindent 8 }}
      annotations:
        checksum/config: {{ include "kvservice.redisConf" . | sha256sum }}
    spec:
      automountServiceAccountToken: false
      terminationGracePeriodSeconds: 60
      securityContext:
        {{- include "kvservice.podSecurity" 999 | nindent 8 }}
      {{- with include "kvservice.pullSecrets" $root }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- with include "kvservice.placing" $root.Values.redis }}
      {{- . | nindent 6 }}
      {{- end }}
      {{- include "kvservice.spread" (dict "root" $root "component" .role) | nindent 6 }}
      containers:
        - name: redis
          image: {{ include "kvservice.redisImage" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [{{ $root.Values.redis.server }}, /etc/redis/redis.conf, --requirepass, $(REDIS_PASSWORD)]
          securityContext:
            {{- include "kvservice.containerSecurity" $root | nindent 12 }}
          env:
            - name: REDIS_PASSWORD
              valueFrom: {secretKeyRef: {name: {{ include "kvservice.redisSecretName" $root }}, key: {{ .role }}}}
            # Read by the client of the probes.
            - {name: REDISCLI_AUTH, value: $(REDIS_PASSWORD)}
          ports:
            - {name: redis, containerPort: {{ include "kvservice.ports.redis" $root }}}
          # A server that still reads its file answers with an error.
          startupProbe:
            exec: {command: [{{ $root.Values.redis.cli }}, -e, ping]}
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: 120
          readinessProbe:
            exec: {command: [{{ $root.Values.redis.cli }}, -e, ping]}
            periodSeconds: 10
            timeoutSeconds: 3
          livenessProbe:
            tcpSocket: {port: redis}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          resources:
            requests: {cpu: {{ $table.cpu | quote }}, memory: {{ $memory | quote }}}
            limits: {memory: {{ $memory | quote }}}
          volumeMounts:
            - {name: config, mountPath: /etc/redis, readOnly: true}
            - {name: data, mountPath: /data}
      volumes:
        - name: config
          configMap: {name: {{ include "kvservice.redisName" . }}}
        {{- if eq .role "kv" }}
        - name: data
          emptyDir: {sizeLimit: 64Mi}
        {{- end }}
  {{- if ne .role "kv" }}
  volumeClaimTemplates:
    - metadata:
        name: data
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $table.storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests: {storage: {{ $table.size }}}
  {{- end }}
{{- end }}
