{{/* The files that processes are started with. Options come before what the chart itself decides. */}}

{{- define "splitserve.servedName" -}}
{{- default .Values.model.name .Values.model.servedName -}}
{{- end -}}

{{/* The model's directory in every pod. */}}
{{- define "splitserve.modelDirectory" -}}
{{- if eq .Values.model.source "demo" -}}
demo
{{- else if eq .Values.model.source "hub" -}}
/models/{{ .Values.model.name | replace "/" "--" }}
{{- else -}}
{{- printf "/models/%s" .Values.model.path | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{- define "splitserve.routerConfig" -}}
{{- $config := deepCopy .Values.router.config -}}
{{- $objectives := dict -}}
{{- with .Values.slo.ttftSeconds }}{{- $_ := set $objectives "ttft_s" . -}}{{- end -}}
{{- with .Values.slo.tpotSeconds }}{{- $_ := set $objectives "tpot_s" . -}}{{- end -}}
{{- if $objectives -}}
{{- $classes := dict "slo_classes" (dict "standard" $objectives) -}}
{{- $config = include "splitserve.merged" (list $classes $config) | fromYaml -}}
{{- end -}}
{{- $_ := set $config "listen" (printf "%s:50051" .Values.bindAddress) -}}
{{- $_ := set $config "metrics" (printf "%s:9400" .Values.bindAddress) -}}
{{- if .Values.router.http -}}
{{- $_ := set $config "http" (printf "%s:8000" .Values.bindAddress) -}}
{{- end -}}
{{- $_ := set $config "model" (include "splitserve.modelDirectory" .) -}}
{{- $_ := set $config "served_model_name" (include "splitserve.servedName" .) -}}
{{- if .Values.router.plan -}}
{{- $_ := set $config "plan" "/etc/splitserve/config/plan.yaml" -}}
{{- end -}}
{{- if ne .Values.tls.mode "none" -}}
{{- $tls := dict "certificate" "/etc/splitserve/tls/tls.crt" "key" "/etc/splitserve/tls/tls.key" -}}
{{- if .Values.tls.mutual }}{{- $_ := set $tls "client_ca" "/etc/splitserve/tls/ca.crt" -}}{{- end -}}
{{- $_ := set $config "tls" $tls -}}
{{- end -}}
{{- if .Values.apiKeys.secretName -}}
{{- $_ := set $config "api_keys" (printf "/etc/splitserve/api-keys/%s" .Values.apiKeys.file) -}}
{{- end -}}
{{- $_ := set $config "insecure" .Values.insecure -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "splitserve.gatewayConfig" -}}
{{- $config := deepCopy .Values.gateway.config -}}
{{- $_ := set $config "router" (printf "%s:50051" (include "splitserve.routers" .)) -}}
{{- $_ := set $config "listen" (printf "%s:8000" .Values.bindAddress) -}}
{{- if .Values.gateway.tokenTexts -}}
{{- $_ := set $config "model" (include "splitserve.modelDirectory" .) -}}
{{- end -}}
{{- if ne .Values.tls.mode "none" -}}
{{- $_ := set $config "tls" (dict "certificate" "/etc/splitserve/tls/tls.crt" "key" "/etc/splitserve/tls/tls.key") -}}
{{- $_ := set $config "router_tls" (include "splitserve.callerTls" . | fromYaml) -}}
{{- end -}}
{{- $_ := set $config "insecure" .Values.insecure -}}
{{- toYaml $config -}}
{{- end -}}

{{/* How whoever calls a router knows it: by the name that it is called by, whichever of the routers answers. */}}
{{- define "splitserve.callerTls" -}}
ca: /etc/splitserve/worker-tls/ca.crt
{{- if .Values.tls.mutual }}
certificate: /etc/splitserve/worker-tls/tls.crt
key: /etc/splitserve/worker-tls/tls.key
{{- end }}
{{- end -}}

{{/* Takes (list $ pool). Name and address of a worker are its pod's, and come by environment, as does its place among those that
a worker spans; they wait for each other as long as a model may take to load. */}}
{{- define "splitserve.workerConfig" -}}
{{- $root := index . 0 -}}{{- $pool := index . 1 -}}{{- $values := $root.Values -}}
{{- $config := dict "pool" (ternary "prefill" "decode" (eq $pool.role "prefill")) -}}
{{- $_ := set $config "model" (include "splitserve.modelDirectory" $root) -}}
{{- $_ := set $config "served_model_name" (include "splitserve.servedName" $root) -}}
{{- $_ := set $config "routers" (list (printf "%s:50051" (include "splitserve.routers" $root))) -}}
{{- $engine := deepCopy $pool.engine -}}
{{- if eq $engine.kind "vllm" -}}
{{- $_ := set $engine "tensor_parallel_size" $pool.parallelism.tensor -}}
{{- $_ := set $engine "pipeline_parallel_size" $pool.parallelism.pipeline -}}
{{- end -}}
{{- $_ := set $config "engine" $engine -}}
{{- $_ := set $config "kv_transfer" (include "splitserve.merged" (list $values.kvTransfer.settings (dict "mode" $values.kvTransfer.mode)) | fromYaml) -}}
{{- if gt (int $pool.nodesPerWorker) 1 -}}
{{- $_ := set $config "nodes" (dict "wait_s" $pool.startupTimeoutSeconds) -}}
{{- end -}}
{{- $_ := set $config "metrics" (printf "%s:9400" $values.bindAddress) -}}
{{- if ne $values.tls.mode "none" -}}
{{- $_ := set $config "router_tls" (include "splitserve.callerTls" $root | fromYaml) -}}
{{- $_ := set $config "metrics_tls" (dict "certificate" "/etc/splitserve/worker-tls/tls.crt" "key" "/etc/splitserve/worker-tls/tls.key") -}}
{{- end -}}
{{- if $values.apiKeys.secretName -}}
{{- $_ := set $config "api_key_file" (printf "/etc/splitserve/api-keys/%s" $values.apiKeys.workerKey) -}}
{{- end -}}
{{- $_ := set $config "insecure" $values.insecure -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Seconds: no request outlives its deadline, so no drain does. */}}
{{- define "splitserve.workerGrace" -}}
{{- $root := index . 0 -}}{{- $pool := index . 1 -}}
{{- if $pool.terminationGracePeriodSeconds -}}
{{- int64 $pool.terminationGracePeriodSeconds -}}
{{- else -}}
{{- $deadline := default 600 $root.Values.router.config.deadline_s -}}
{{- add (ceil $deadline | int64) 30 -}}
{{- end -}}
{{- end -}}
