{{/* What the schema can't say: values that need each other. Nothing is rendered before all of it holds. */}}
{{- define "splitserve.validate" -}}
{{- $values := .Values -}}
{{- $wrong := list -}}
{{- if not (or $values.model.name (eq $values.model.source "demo")) -}}
{{- $wrong = append $wrong "model.name: say what is served, such as Qwen/Qwen3-8B" -}}
{{- end -}}
{{- if and (eq $values.model.source "pvc") (not $values.model.pvc.claimName) -}}
{{- $wrong = append $wrong "model.pvc.claimName: model.source is pvc, so say which claim holds the model" -}}
{{- end -}}
{{- if and (eq $values.model.source "hostPath") (not $values.model.hostPath.path) -}}
{{- $wrong = append $wrong "model.hostPath.path: model.source is hostPath, so say which directory holds the model" -}}
{{- end -}}
{{- if not (or $values.insecure (and (ne $values.tls.mode "none") $values.apiKeys.secretName)) -}}
{{- $wrong = append $wrong "insecure: routers can be reached by other pods; set tls.mode and apiKeys.secretName, or insecure: true where NetworkPolicy or a mesh keeps strangers out" -}}
{{- end -}}
{{- if and (eq $values.tls.mode "secret") (not $values.tls.secretName) -}}
{{- $wrong = append $wrong "tls.secretName: tls.mode is secret, so say which Secret holds tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- if and (eq $values.tls.mode "certManager") (not $values.tls.certManager.issuerRef.name) -}}
{{- $wrong = append $wrong "tls.certManager.issuerRef: tls.mode is certManager, so name an Issuer or ClusterIssuer" -}}
{{- end -}}
{{- if and $values.tls.mutual (eq $values.tls.mode "none") -}}
{{- $wrong = append $wrong "tls.mutual: needs certificates; set tls.mode" -}}
{{- end -}}
{{- if and $values.grpcRoute.enabled (not $values.grpcRoute.parentRefs) -}}
{{- $wrong = append $wrong "grpcRoute.parentRefs: say which Gateway the route belongs to" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not (include "splitserve.httpService" .)) -}}
{{- $wrong = append $wrong "ingress.enabled: nothing serves HTTP; set router.http or gateway.enabled" -}}
{{- end -}}
{{- with $values.router -}}
{{- if gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas) -}}
{{- $wrong = append $wrong "router.autoscaling.minReplicas: more than maxReplicas" -}}
{{- end -}}
{{- if and (eq .autoscaling.mode "hpa") (not (dig "requests" "cpu" "" .resources)) -}}
{{- $wrong = append $wrong "router.resources.requests.cpu: routers are scaled by the share of it that they use; say it" -}}
{{- end -}}
{{- if and (eq (toString .strategy.maxSurge) "0") (eq (toString .strategy.maxUnavailable) "0") -}}
{{- $wrong = append $wrong "router.strategy: maxSurge and maxUnavailable are both 0; no rollout could ever end" -}}
{{- end -}}
{{- end -}}
{{- $full := include "splitserve.fullname" . -}}
{{- range $name, $pool := include "splitserve.pools" . | fromYaml -}}
{{- if has $name (list "router" "routers" "gateway" "workers") -}}
{{- $wrong = append $wrong (printf "pools.%s: the chart uses this name itself; choose another" $name) -}}
{{- end -}}
{{- $ranks := mul $pool.parallelism.tensor $pool.parallelism.pipeline -}}
{{- if mod $ranks $pool.nodesPerWorker -}}
{{- $wrong = append $wrong (printf "pools.%s.nodesPerWorker: %d GPUs (tensor x pipeline) can't be dealt out to %d nodes evenly" $name $ranks (int64 $pool.nodesPerWorker)) -}}
{{- end -}}
{{- if and (gt (int $pool.nodesPerWorker) 1) (eq $pool.engine.kind "sim") -}}
{{- $wrong = append $wrong (printf "pools.%s.nodesPerWorker: a simulated worker is one process" $name) -}}
{{- end -}}
{{- if and (gt (int $pool.nodesPerWorker) 1) (eq $values.kvTransfer.mode "pull") -}}
{{- $wrong = append $wrong (printf "pools.%s.nodesPerWorker: vLLM's stock connector does not pull across nodes; set kvTransfer.mode to push" $name) -}}
{{- end -}}
{{- $scaling := $pool.autoscaling -}}
{{- if gt (int $scaling.minWorkers) (int $scaling.maxWorkers) -}}
{{- $wrong = append $wrong (printf "pools.%s.autoscaling.minWorkers: more than maxWorkers" $name) -}}
{{- end -}}
{{- if and (eq $scaling.mode "keda") (not $scaling.triggers) (not $values.monitoring.prometheusAddress) -}}
{{- $wrong = append $wrong (printf "monitoring.prometheusAddress: KEDA scales pool %s by what Prometheus says; say where it is" $name) -}}
{{- end -}}
{{- if and (eq (toString $pool.strategy.maxSurge) "0") (eq (toString $pool.strategy.maxUnavailable) "0") -}}
{{- $wrong = append $wrong (printf "pools.%s.strategy: maxSurge and maxUnavailable are both 0; no rollout could ever end" $name) -}}
{{- end -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n  %s" (join "\n  " $wrong)) -}}
{{- end -}}
{{- end -}}
