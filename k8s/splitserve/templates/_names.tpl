{{/* Names, labels, addresses: what everything else is called. */}}

{{- define "splitserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough for a pool's name and a pod's suffix behind it. */}}
{{- define "splitserve.fullname" -}}
{{- $name := include "splitserve.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of everything; takes (dict "root" $ "component" "router"). */}}
{{- define "splitserve.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: splitserve
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{ include "splitserve.selector" . }}
{{- end -}}

{{- define "splitserve.selector" -}}
app.kubernetes.io/name: {{ include "splitserve.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .pool }}
splitserve.io/pool: {{ . }}
{{- end }}
{{- end -}}

{{- define "splitserve.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "splitserve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Takes (list $ image): an image's settings as a reference. */}}
{{- define "splitserve.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The headless Service's name, which stands for every router: workers join all its addresses, gateways call all of them. */}}
{{- define "splitserve.routers" -}}
{{- printf "%s-routers.%s.svc" (include "splitserve.fullname" .) .Release.Namespace -}}
{{- end -}}

{{/* The client Service's name, which is in the routers' certificate. */}}
{{- define "splitserve.address" -}}
{{- printf "%s.%s.svc" (include "splitserve.fullname" .) .Release.Namespace -}}
{{- end -}}

{{/* Where OpenAI's clients go: a Service's name, or nothing. */}}
{{- define "splitserve.httpService" -}}
{{- if .Values.gateway.enabled -}}
{{- include "splitserve.fullname" . -}}-gateway
{{- else if .Values.router.http -}}
{{- include "splitserve.fullname" . -}}
{{- end -}}
{{- end -}}

{{- define "splitserve.serverSecret" -}}
{{- if eq .Values.tls.mode "certManager" -}}
{{- include "splitserve.fullname" . -}}-tls
{{- else -}}
{{- .Values.tls.secretName -}}
{{- end -}}
{{- end -}}

{{- define "splitserve.workerSecret" -}}
{{- if eq .Values.tls.mode "certManager" -}}
{{- include "splitserve.fullname" . -}}-worker-tls
{{- else -}}
{{- default .Values.tls.secretName .Values.tls.workerSecretName -}}
{{- end -}}
{{- end -}}

{{- define "splitserve.scheme" -}}
{{- if eq .Values.tls.mode "none" -}}http{{- else -}}https{{- end -}}
{{- end -}}

{{/* Takes (list under over), gives YAML: over wins, maps are merged. Sprig's own merges lose 0, false and "". */}}
{{- define "splitserve.merged" -}}
{{- $result := deepCopy (index . 0) -}}
{{- range $key, $value := index . 1 -}}
{{- $below := get $result $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $below) -}}
{{- $_ := set $result $key (include "splitserve.merged" (list $below $value) | fromYaml) -}}
{{- else -}}
{{- $_ := set $result $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $result -}}
{{- end -}}

{{/* Every pool, whole: its own settings over poolDefaults. YAML of a map by name. */}}
{{- define "splitserve.pools" -}}
{{- $pools := dict -}}
{{- range $name, $own := default (dict "prefill" (dict "role" "prefill") "decode" (dict "role" "decode")) .Values.pools -}}
{{- $pool := include "splitserve.merged" (list $.Values.poolDefaults $own) | fromYaml -}}
{{- $engine := $pool.engine -}}
{{- $kind := default (default "vllm" $.Values.engine.kind) $engine.kind -}}
{{- if eq $kind (default "vllm" $.Values.engine.kind) -}}
{{- $engine = include "splitserve.merged" (list $.Values.engine $engine) | fromYaml -}}
{{- end -}}
{{- $_ := set $engine "kind" $kind -}}
{{- $_ := set $pool "engine" $engine -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- toYaml $pools -}}
{{- end -}}

{{/* The name in the workers' certificate, wherever their pods are. */}}
{{- define "splitserve.workerAddress" -}}
{{- printf "%s-workers.%s.svc" (include "splitserve.fullname" .) .Release.Namespace -}}
{{- end -}}
