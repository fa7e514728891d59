{{/* Takes (list $ "serverSecret" or "workerSecret"): whose certificate the endpoint shows. */}}
{{- define "splitserve.scrape" -}}
{{- $root := index . 0 -}}
{{- $secret := include (printf "splitserve.%s" (index . 1)) $root -}}
path: /metrics
interval: {{ $root.Values.monitoring.interval }}
scheme: {{ include "splitserve.scheme" $root }}
{{- if ne $root.Values.tls.mode "none" }}
tlsConfig:
  ca:
    secret: {name: {{ $secret }}, key: ca.crt}
  serverName: {{ ternary (include "splitserve.address" $root) (include "splitserve.workerAddress" $root) (eq (index . 1) "serverSecret") }}
  {{- if and $root.Values.tls.mutual (eq (index . 1) "serverSecret") }}
  cert:
    secret: {name: {{ include "splitserve.workerSecret" $root }}, key: tls.crt}
  keySecret: {name: {{ include "splitserve.workerSecret" $root }}, key: tls.key}
  {{- end }}
{{- end }}
{{- end -}}
