{{/* What a pool is scaled by. Takes (list $ name pool); gives YAML: by the metric's name in the external metrics API its query for
Prometheus, the labels that select it there (which the monitors' targetLabels add), and what it is kept below. The counts of rates are clamped: without traffic a signal is 0,
not NaN. README.md has prometheus-adapter's rules for the same names. */}}
{{- define "splitserve.signals" -}}
{{- $root := index . 0 -}}{{- $pool := index . 2 -}}
{{- $targets := $pool.autoscaling.targets -}}
{{- $routers := printf "namespace=\"%s\",app_kubernetes_io_instance=\"%s\"" $root.Release.Namespace $root.Release.Name -}}
{{- $workers := printf "%s,splitserve_io_pool=\"%s\"" $routers (index . 1) -}}
{{- $fleet := dict "app_kubernetes_io_instance" $root.Release.Name -}}
{{- $signals := dict -}}
{{- if and $targets.queueSeconds (ne $pool.role "decode") -}}
{{- $query := printf "sum(rate(splitserve_queue_seconds_sum{%s}[2m])) / clamp_min(sum(rate(splitserve_queue_seconds_count{%s}[2m])), 1e-9)" $routers $routers -}}
{{- $_ := set $signals "splitserve_queue_mean_seconds" (dict "query" $query "labels" $fleet "target" $targets.queueSeconds) -}}
{{- end -}}
{{- if and $targets.kvUse (ne $pool.role "prefill") -}}
{{- $query := printf "1 - sum(splitserve_worker_kv_blocks{state=\"free\",%s}) / sum(splitserve_worker_kv_total_blocks{%s})" $workers $workers -}}
{{- $_ := set $signals "splitserve_pool_kv_use" (dict "query" $query "labels" (dict "app_kubernetes_io_instance" $root.Release.Name "splitserve_io_pool" (index . 1)) "target" $targets.kvUse) -}}
{{- end -}}
{{- if $targets.missed -}}
{{- $query := printf "sum(rate(splitserve_slo_outputs_total{met=\"no\",%s}[5m])) / clamp_min(sum(rate(splitserve_slo_outputs_total{%s}[5m])), 1e-9)" $routers $routers -}}
{{- $_ := set $signals "splitserve_missed_share" (dict "query" $query "labels" $fleet "target" (subf 1 $root.Values.slo.attainment)) -}}
{{- end -}}
{{- toYaml $signals -}}
{{- end -}}
