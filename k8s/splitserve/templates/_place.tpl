{{/* Pods of one component on nodes apart, where there are enough. Takes what "splitserve.selector" takes. */}}
{{- define "splitserve.apart" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "splitserve.selector" . | nindent 12 }}
{{- end -}}

{{/* Workers of all pools on one node, so that KV moves over its NVLink. */}}
{{- define "splitserve.together" -}}
podAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "splitserve.selector" . | nindent 12 }}
{{- end -}}
