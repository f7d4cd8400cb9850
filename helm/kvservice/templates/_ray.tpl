{{/* Ray's pods. The volumes `ray-logs` and `shared-mem` have the names that KubeRay would give them, so that it shares
the first with the autoscaler and adds no second one. */}}

{{- define "kvservice.rayVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 2Gi}
- name: ray-logs
  emptyDir: {sizeLimit: 2Gi}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ include "kvservice.bytes" .Values.ray.shmSize | quote }}}
- name: home
  emptyDir: {sizeLimit: 1Gi}
{{- with .Values.ray.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kvservice.rayMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: shared-mem, mountPath: /dev/shm}
- {name: home, mountPath: /var/lib/kvservice}
{{- with .Values.ray.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kvservice.rayEnv" -}}
- {name: HOME, value: /var/lib/kvservice}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- with .Values.ray.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* KubeRay leaves alone a container that has both probes; its own readiness asks Serve's HTTP proxy, which is off. */}}
{{- define "kvservice.raylet" -}}
httpGet: {path: /api/local_raylet_healthz, port: {{ include "kvservice.ports.agent" . }}}
{{- end }}

{{- define "kvservice.rayHead" -}}
metadata:
  labels:
    {{- include "kvservice.podLabels" (dict "root" . "component" "ray-head") | nindent 4 }}
  {{- with .Values.ray.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "kvservice.serviceAccountName" (dict "root" . "component" "ray") }}
  automountServiceAccountToken: {{ include "kvservice.rayScales" . }}
  terminationGracePeriodSeconds: 60
  securityContext:
    {{- include "kvservice.podSecurity" 10001 | nindent 4 }}
  {{- with include "kvservice.pullSecrets" . }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "kvservice.placing" .Values.ray.head }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ include "kvservice.image" (dict "root" . "image" .Values.ray.images.cpu) }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "kvservice.containerSecurity" . | nindent 8 }}
      env:
        {{- include "kvservice.rayEnv" . | nindent 8 }}
        {{- if .Values.redis.caSecret }}
        - {name: RAY_REDIS_CA_CERT, value: /etc/kvservice/redis-ca/ca.crt}
        {{- end }}
      ports:
        - {name: gcs-server, containerPort: {{ include "kvservice.ports.gcs" . }}}
        - {name: dashboard, containerPort: {{ include "kvservice.ports.dashboard" . }}}
        - {name: client, containerPort: {{ include "kvservice.ports.rayClient" . }}}
        - {name: metrics, containerPort: {{ include "kvservice.ports.rayMetrics" . }}}
        - {name: agent, containerPort: {{ include "kvservice.ports.agent" . }}}
      startupProbe:
        httpGet: {path: /api/gcs_healthz, port: dashboard}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 60
      readinessProbe:
        httpGet: {path: /api/gcs_healthz, port: dashboard}
        periodSeconds: 10
        timeoutSeconds: 5
      livenessProbe:
        {{- include "kvservice.raylet" . | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      resources:
        {{- toYaml .Values.ray.head.resources | nindent 8 }}
      volumeMounts:
        {{- include "kvservice.rayMounts" . | nindent 8 }}
        {{- with include "kvservice.redisCaMount" . }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "kvservice.rayVolumes" . | nindent 4 }}
    {{- with include "kvservice.redisCaVolume" . }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "kvservice.rayScales" -}}
{{- $scales := .Values.ray.externalScaler -}}
{{- range .Values.models }}{{ if .deployment.autoscaling }}{{ $scales = true }}{{ end }}{{ end -}}
{{- $scales -}}
{{- end }}

{{/* The pod of one model's workers: (dict "root" $ "model" TABLE). */}}
{{- define "kvservice.rayWorker" -}}
{{- $root := .root -}}
{{- $model := .model -}}
{{- $deployment := $model.deployment -}}
{{- $component := printf "worker-%s" $deployment.name -}}
{{- $image := get $root.Values.ray.images ($model.image | default "cpu") -}}
{{- $gpus := ceil (float64 ($deployment.num_gpus | default 0)) | int -}}
{{- $memory := include "kvservice.workerMemory" . -}}
metadata:
  labels:
    {{- include "kvservice.podLabels" (dict "root" $root "component" $component) | nindent 4 }}
    kvservice/role: worker
  {{- with $root.Values.ray.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ add (include "kvservice.drainGrace" $model | float64 | ceil | int) 60 }}
  securityContext:
    {{- include "kvservice.podSecurity" 10001 | nindent 4 }}
  {{- with include "kvservice.pullSecrets" $root }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $model.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $model.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- $placing := pick $model "nodeSelector" "tolerations" "affinity" }}
  {{- with $root.Values.ray.priorityClassName }}{{ $_ := set $placing "priorityClassName" . }}{{ end }}
  {{- with include "kvservice.placing" $placing }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- include "kvservice.spread" (dict "root" $root "component" $component "constraints" $model.topologySpreadConstraints) | nindent 2 }}
  {{- if or $model.initContainers (ne $model.source.type "volume") }}
  initContainers:
    {{- range $model.initContainers }}
    - {{ merge (deepCopy .) (dict "securityContext" (include "kvservice.containerSecurity" $root | fromYaml)) | toYaml | nindent 6 | trim }}
    {{- end }}
    {{- if ne $model.source.type "volume" }}
    - name: model
      {{- if eq $model.source.type "fetch" }}
      image: {{ include "kvservice.image" (dict "root" $root "image" $image) }}
      command: [kvservice, model, fetch, {{ $deployment.worker.model | default "smollm2-135m" }}]
      env:
        - {name: HOME, value: /var/lib/kvservice}
      {{- else }}
      image: {{ include "kvservice.image" (dict "root" (dict "Values" (dict "image" (dict "registry" "")) "Chart" $root.Chart) "image" $model.source.image) }}
      args: [copy, {{ $model.source.from | quote }}, {{ $deployment.worker.model }}]
      {{- with $model.source.existingSecret }}
      envFrom: [{secretRef: {name: {{ . }}}}]
      {{- end }}
      {{- end }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "kvservice.containerSecurity" $root | nindent 8 }}
      resources:
        requests: {cpu: 500m, memory: 2Gi}
        limits: {memory: 2Gi}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if eq $model.source.type "fetch" }}
        - {name: home, mountPath: /var/lib/kvservice}
        - {name: models, mountPath: /var/lib/kvservice/.cache/kvservice}
        {{- else }}
        - {name: models, mountPath: /models}
        {{- end }}
    {{- end }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ include "kvservice.image" (dict "root" $root "image" $image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "kvservice.containerSecurity" $root | nindent 8 }}
      env:
        - name: KVSERVICE_WORKER_HOST
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        - {name: KVSERVICE_CONFIG, value: /etc/kvservice/config/config.json}
        {{- include "kvservice.stateEnv" $root | nindent 8 }}
        {{- with include "kvservice.kvEnv" $root }}
        {{- . | nindent 8 }}
        {{- end }}
        - {name: GOMP_SPINCOUNT, value: "5000"}
        {{- if $gpus }}
        - {name: TRITON_CACHE_DIR, value: /var/lib/kvservice/triton}
        {{- end }}
        {{- include "kvservice.rayEnv" $root | nindent 8 }}
        {{- with $model.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $model.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - {name: internal, containerPort: {{ include "kvservice.ports.internal" $root }}}
        - {name: kv-metrics, containerPort: {{ include "kvservice.ports.metrics" $root }}}
        - {name: metrics, containerPort: {{ include "kvservice.ports.rayMetrics" $root }}}
        - {name: agent, containerPort: {{ include "kvservice.ports.agent" $root }}}
      lifecycle:
        preStop:
          exec:
            command: [kvservice, drain-worker]
      startupProbe:
        {{- include "kvservice.raylet" $root | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 120
      readinessProbe:
        {{- include "kvservice.raylet" $root | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
      livenessProbe:
        {{- include "kvservice.raylet" $root | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      resources:
        requests:
          cpu: {{ $deployment.num_cpus | default 1 | quote }}
          memory: {{ $memory | quote }}
          {{- if $gpus }}
          {{ $model.gpuResource | default "nvidia.com/gpu" }}: {{ $gpus | quote }}
          {{- end }}
          {{- range $name, $count := $model.extraResources }}
          {{ $name }}: {{ $count | quote }}
          {{- end }}
        limits:
          memory: {{ $memory | quote }}
          {{- if $gpus }}
          {{ $model.gpuResource | default "nvidia.com/gpu" }}: {{ $gpus | quote }}
          {{- end }}
          {{- range $name, $count := $model.extraResources }}
          {{ $name }}: {{ $count | quote }}
          {{- end }}
      volumeMounts:
        {{- include "kvservice.rayMounts" $root | nindent 8 }}
        - {name: config, mountPath: /etc/kvservice/config, readOnly: true}
        - {name: internal-tls, mountPath: /etc/kvservice/internal-tls, readOnly: true}
        {{- if eq $model.source.type "fetch" }}
        - {name: models, mountPath: /var/lib/kvservice/.cache/kvservice}
        {{- else }}
        - {name: models, mountPath: /models, readOnly: true{{ with $model.source.subPath }}, subPath: {{ . }}{{ end }}}
        {{- end }}
        {{- with include "kvservice.redisCaMount" $root }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "kvservice.rayVolumes" $root | nindent 4 }}
    - name: config
      configMap: {name: {{ include "kvservice.fullname" $root }}}
    {{- include "kvservice.internalTlsVolume" (dict "root" $root "side" "worker") | nindent 4 }}
    - name: models
      {{- if eq $model.source.type "volume" }}
      persistentVolumeClaim: {claimName: {{ $model.source.claimName }}, readOnly: true}
      {{- else if and (eq $model.source.type "fetch") (or $root.Values.modelCache.enabled $root.Values.modelCache.existingClaim) }}
      persistentVolumeClaim: {claimName: {{ include "kvservice.modelClaimName" $root }}}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- with include "kvservice.redisCaVolume" $root }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}
