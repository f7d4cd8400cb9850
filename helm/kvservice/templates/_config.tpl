{{/* The one configuration, as `kvservice config check` accepts it. Ports are the program's own; nothing sets them. */}}

{{- define "kvservice.ports.api" -}}50051{{- end }}
{{- define "kvservice.ports.internal" -}}50052{{- end }}
{{- define "kvservice.ports.health" -}}50053{{- end }}
{{- define "kvservice.ports.http" -}}8000{{- end }}
{{- define "kvservice.ports.metrics" -}}9464{{- end }}
{{- define "kvservice.ports.redis" -}}6379{{- end }}
{{- define "kvservice.ports.dashboard" -}}8265{{- end }}
{{- define "kvservice.ports.agent" -}}52365{{- end }}
{{- define "kvservice.ports.gcs" -}}6379{{- end }}
{{- define "kvservice.ports.rayClient" -}}10001{{- end }}
{{- define "kvservice.ports.rayMetrics" -}}8080{{- end }}

{{- define "kvservice.internalTls" -}}
{{- dict "cert" "/etc/kvservice/internal-tls/tls.crt" "key" "/etc/kvservice/internal-tls/tls.key" "ca" "/etc/kvservice/internal-tls/ca.crt" "server_name" .Values.internalTls.serverName | toJson }}
{{- end }}

{{/* One model's entry of `ray.deployments`: (dict "root" $ "model" TABLE). The custom resource keeps its workers to its
group of nodes, one to a pod; threads are counted, since a container sees all cores of its node. */}}
{{- define "kvservice.deployment" -}}
{{- $deployment := deepCopy .model.deployment -}}
{{- $cores := max 1 (ceil (get $deployment "num_cpus" | default 1.0)) | int -}}
{{- $worker := get $deployment "worker" | default dict -}}
{{- $worker = merge (dict "port" (include "kvservice.ports.internal" . | int) "tls" (include "kvservice.internalTls" .root | fromJson)) $worker (dict "threads" $cores) -}}
{{- $_ := set $deployment "worker" $worker -}}
{{- $_ := set $deployment "resources" (dict (include "kvservice.rayResource" .model) 1) -}}
{{- $deployment | toJson }}
{{- end }}

{{- define "kvservice.rayResource" -}}
kvservice-{{ .deployment.name }}
{{- end }}

{{- define "kvservice.config" -}}
{{- $gateway := merge (dict "host" "0.0.0.0" "port" (include "kvservice.ports.api" . | int) "health_port" (include "kvservice.ports.health" . | int) "internal_tls" (include "kvservice.internalTls" . | fromJson)) (deepCopy .Values.config.gateway) -}}
{{- if .Values.gateway.http.enabled -}}
{{- $_ := set $gateway "http_port" (include "kvservice.ports.http" . | int) -}}
{{- end -}}
{{- with .Values.gateway.tls -}}
{{- if .existingSecret -}}
{{- $tls := dict "cert" "/etc/kvservice/tls/tls.crt" "key" "/etc/kvservice/tls/tls.key" -}}
{{- if .clientCa -}}
{{- $_ := set $tls "client_ca" "/etc/kvservice/tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $gateway "tls" $tls -}}
{{- end -}}
{{- end -}}
{{- $telemetry := merge (dict "metrics_host" "0.0.0.0" "metrics_port" (include "kvservice.ports.metrics" . | int)) (deepCopy .Values.config.telemetry) -}}
{{- $config := dict "gateway" $gateway "telemetry" $telemetry "log_level" .Values.config.log_level "api_keys" "/etc/kvservice/keys/api-keys.json" -}}
{{- if .Values.ray.enabled -}}
{{- $deployments := list -}}
{{- range .Values.models -}}
{{- $deployments = append $deployments (include "kvservice.deployment" (dict "root" $ "model" .) | fromJson) -}}
{{- end -}}
{{- $_ := set $config "ray" (dict "deployments" $deployments "external_scaler_enabled" .Values.ray.externalScaler) -}}
{{- end -}}
{{- $config | toPrettyJson }}
{{- end }}

{{/* What Ray Serve is told: the same deployments, as `kvservice serve --ray-config` writes them. */}}
{{- define "kvservice.serveConfig" -}}
{{- $applications := list -}}
{{- $scaled := dict -}}
{{- range .Values.models -}}
{{- $args := include "kvservice.deployment" (dict "root" $ "model" .) | fromJson -}}
{{- $grace := addf (include "kvservice.drainGrace" . | float64) 15 -}}
{{- $actor := dict "num_cpus" (get $args "num_cpus" | default 1.0) "num_gpus" (get $args "num_gpus" | default 0.0) "resources" $args.resources -}}
{{- $options := dict "name" "Worker" "max_ongoing_requests" (get $args "max_ongoing_requests" | default 100 | int) "health_check_period_s" (get $args "health_check_period_s" | default 10.0) "health_check_timeout_s" (get $args "health_check_timeout_s" | default 30.0) "graceful_shutdown_timeout_s" $grace "ray_actor_options" $actor -}}
{{- with get $args "autoscaling" -}}
{{- $policy := dict "policy_function" "kvservice.worker.ray_serve:MemoryPolicy" "policy_kwargs" (dict "occupancy" (.occupancy | default 0.8) "queue_s" (.queue_s | default 2.0) "miss_s" (.miss_s | default 0.2)) -}}
{{- $table := dict "min_replicas" (.min_replicas | default 1 | int) "max_replicas" (.max_replicas | int) "occupancy" (.occupancy | default 0.8) "queue_s" (.queue_s | default 2.0) "miss_s" (.miss_s | default 0.2) "delay_s" (ternary 20.0 .delay_s (kindIs "invalid" .delay_s)) "down_delay_s" (ternary 300.0 .down_delay_s (kindIs "invalid" .down_delay_s)) -}}
{{- if gt $table.max_replicas $table.min_replicas }}{{ $_ := set $scaled $args.name $table }}{{ end -}}
{{- $_ := set $options "autoscaling_config" (dict "min_replicas" (.min_replicas | default 1 | int) "max_replicas" (.max_replicas | int) "upscale_delay_s" (ternary 20.0 .delay_s (kindIs "invalid" .delay_s)) "downscale_delay_s" 0.0 "policy" $policy) -}}
{{- else -}}
{{- $_ := set $options "num_replicas" (get $args "replicas" | default 1 | int) -}}
{{- end -}}
{{- $application := dict "name" (printf "kvservice-%s" $args.name) "import_path" "kvservice.cli.ray_app:build" "route_prefix" nil "external_scaler_enabled" $.Values.ray.externalScaler "args" $args "deployments" (list $options) -}}
{{- $applications = append $applications $application -}}
{{- end -}}
{{- if $scaled -}}
{{- /* Takes workers away when load goes. On the head: on a worker's node it would keep the node from being given back. */ -}}
{{- $actor := dict "num_cpus" 0 "resources" (dict "node:__internal_head__" 0.001) -}}
{{- $options := dict "name" "Scaler" "num_replicas" 1 "health_check_period_s" 10.0 "ray_actor_options" $actor -}}
{{- $applications = append $applications (dict "name" "kvservice_scaler" "import_path" "kvservice.cli.ray_app:build_scaler" "route_prefix" nil "args" $scaled "deployments" (list $options)) -}}
{{- end -}}
{{- dict "proxy_location" "Disabled" "applications" $applications | toYaml }}
{{- end }}

{{/* Seconds that a model's running calls have to end in. */}}
{{- define "kvservice.drainGrace" -}}
{{- $worker := .deployment.worker | default dict -}}
{{- ternary 30 $worker.drain_grace_s (kindIs "invalid" $worker.drain_grace_s) -}}
{{- end }}

{{/* Workers of a model at the start. */}}
{{- define "kvservice.firstReplicas" -}}
{{- $deployment := .deployment -}}
{{- if $deployment.autoscaling }}{{ $deployment.autoscaling.min_replicas | default 1 | int }}{{ else }}{{ $deployment.replicas | default 1 | int }}{{ end -}}
{{- end }}

{{- define "kvservice.mostReplicas" -}}
{{- $deployment := .deployment -}}
{{- if $deployment.autoscaling }}{{ $deployment.autoscaling.max_replicas | int }}{{ else }}{{ $deployment.replicas | default 1 | int }}{{ end -}}
{{- end }}

{{/* Host memory of a worker's pod: KV of the host tier, on a CPU the device's KV too, shared memory, and the rest. */}}
{{- define "kvservice.workerMemory" -}}
{{- $worker := .model.deployment.worker | default dict -}}
{{- $sum := include "kvservice.bytes" ($worker.host_bytes | default "4GiB") | int64 -}}
{{- if ne ($worker.device | default "cpu") "cuda" -}}
{{- $sum = add $sum (include "kvservice.bytes" ($worker.kv_bytes | default "512MiB") | int64) -}}
{{- end -}}
{{- $sum = add $sum (include "kvservice.bytes" .root.Values.ray.shmSize | int64) -}}
{{- add $sum (include "kvservice.bytes" (.model.baseMemory | default "3GiB") | int64) -}}
{{- end }}

{{/* What no schema can say. Each template of a workload calls it. */}}
{{- define "kvservice.check" -}}
{{- if and .Values.gateway.hpa.enabled .Values.gateway.keda.enabled -}}
{{- fail "gateway.hpa and gateway.keda are both enabled: two scalers would fight; enable one" -}}
{{- end -}}
{{- if and (not .Values.redis.state.enabled) (not .Values.redis.state.external.existingSecret) -}}
{{- fail "redis.state: enable the bundled one, or name redis.state.external.existingSecret with its URL" -}}
{{- end -}}
{{- if ne (empty .Values.internalTls.gatewaySecret) (empty .Values.internalTls.workerSecret) -}}
{{- fail "internalTls: name both gatewaySecret and workerSecret, or neither; their certificates are of one authority" -}}
{{- end -}}
{{- if and .Values.gateway.route.enabled (not .Values.gateway.route.parentRefs) -}}
{{- fail "gateway.route: name in gateway.route.parentRefs the Gateway that it is attached to" -}}
{{- end -}}
{{- if and .Values.gateway.tls.clientCa (not .Values.gateway.tls.existingSecret) -}}
{{- fail "gateway.tls.clientCa: name gateway.tls.existingSecret, which holds the authority as ca.crt" -}}
{{- end -}}
{{- if .Values.ray.enabled -}}
{{- if not .Values.models -}}
{{- fail "models: name at least one, or set ray.enabled to false" -}}
{{- end -}}
{{- $names := list -}}
{{- range .Values.models -}}
{{- $worker := .deployment.worker | default dict -}}
{{- $name := .deployment.name -}}
{{- if has $name $names -}}
{{- fail (printf "models: %q is there twice; names must be unique" $name) -}}
{{- end -}}
{{- $names = append $names $name -}}
{{- $gpus := .deployment.num_gpus | default 0 -}}
{{- if ne (eq ($worker.device | default "cpu") "cuda") (gt (float64 $gpus) 0.0) -}}
{{- fail (printf "models, %s: deployment.worker.device cuda and deployment.num_gpus go together" $name) -}}
{{- end -}}
{{- if ne (.image | default "cpu") ($worker.device | default "cpu") -}}
{{- fail (printf "models, %s: image %s doesn't fit deployment.worker.device %s" $name (.image | default "cpu") ($worker.device | default "cpu")) -}}
{{- end -}}
{{- if and (ne .source.type "fetch") (not (hasPrefix "/models/" ($worker.model | default ""))) -}}
{{- fail (printf "models, %s: with source.type %s deployment.worker.model is a folder below /models/" $name .source.type) -}}
{{- end -}}
{{- if and .deployment.autoscaling $.Values.ray.externalScaler -}}
{{- fail (printf "models, %s: no `autoscaling` with ray.externalScaler; take one of the two out" $name) -}}
{{- end -}}
{{- end -}}
{{- if gt (int64 .Values.ray.objectStoreBytes) (include "kvservice.bytes" .Values.ray.shmSize | int64) -}}
{{- fail "ray.objectStoreBytes doesn't fit into ray.shmSize" -}}
{{- end -}}
{{- end -}}
{{- end }}
