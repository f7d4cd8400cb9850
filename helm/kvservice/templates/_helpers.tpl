{{/* Names and labels. */}}

{{- define "kvservice.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* At most 40 characters: KubeRay adds to the names of its objects. */}}
{{- define "kvservice.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "kvservice.chart" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Of every object. */}}
{{- define "kvservice.labels" -}}
helm.sh/chart: {{ include "kvservice.chart" . }}
{{ include "kvservice.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: kvservice
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of every pod of the release. */}}
{{- define "kvservice.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kvservice.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of the pods of one component: (dict "root" $ "component" NAME). KubeRay gives its pods a name label of its own where
they have none, so the instance and the component are what they are found by. */}}
{{- define "kvservice.componentLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Of pods: without the chart's version, since a label that changes means new pods, and for Ray a new cluster. */}}
{{- define "kvservice.podLabels" -}}
{{ include "kvservice.selectorLabels" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: kvservice
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kvservice.serviceAccountName" -}}
{{ include "kvservice.fullname" .root }}-{{ .component }}
{{- end }}

{{/* An image: (dict "root" $ "image" TABLE). */}}
{{- define "kvservice.image" -}}
{{- $registry := .root.Values.image.registry -}}
{{- $name := ternary (printf "%s/%s" $registry .image.repository) .image.repository (ne $registry "") -}}
{{- if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "kvservice.redisImage" -}}
{{- with .Values.redis.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end -}}
{{- end }}

{{/* Names of Secrets: made ones, or those that were named. */}}
{{- define "kvservice.secretName" -}}
{{ .Values.secret.existingSecret | default (printf "%s-secret" (include "kvservice.fullname" .)) }}
{{- end }}

{{- define "kvservice.authSecretName" -}}
{{ .Values.auth.existingSecret | default (printf "%s-api-keys" (include "kvservice.fullname" .)) }}
{{- end }}

{{- define "kvservice.redisSecretName" -}}
{{ .Values.redis.existingSecret | default (printf "%s-redis" (include "kvservice.fullname" .)) }}
{{- end }}

{{- define "kvservice.internalTlsSecretName" -}}
{{- $named := get .root.Values.internalTls (printf "%sSecret" .side) -}}
{{ $named | default (printf "%s-internal-tls" (include "kvservice.fullname" .root)) }}
{{- end }}

{{- define "kvservice.modelClaimName" -}}
{{ .Values.modelCache.existingClaim | default (printf "%s-models" (include "kvservice.fullname" .)) }}
{{- end }}

{{/* A size as an integer of bytes: 512MiB, 1.5 GiB, 3GB or a number, as the program takes it. */}}
{{- define "kvservice.bytes" -}}
{{- if kindIs "string" . -}}
{{- $units := dict "" 1 "B" 1 "KB" 1000 "MB" 1000000 "GB" 1000000000 "TB" 1000000000000 "KIB" 1024 "MIB" 1048576 "GIB" 1073741824 "TIB" 1099511627776 -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- $unit := regexFind "[A-Za-z]*$" . | upper -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "size %q: give an integer of bytes, or a number with one of KB, MB, GB, TB, KiB, MiB, GiB, TiB" .) -}}
{{- end -}}
{{- mulf (float64 $number) (get $units $unit) | int64 -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end }}
