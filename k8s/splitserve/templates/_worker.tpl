{{/* One worker's pod, or one of those that a worker spans: they are alike, and LeaderWorkerSet says which is which. Takes
(dict "root" $ "name" pool's name "pool" pool). */}}
{{- define "splitserve.workerPod" -}}
{{- $root := .root -}}{{- $values := .root.Values -}}{{- $pool := .pool -}}
{{- $full := include "splitserve.fullname" $root -}}
{{- $config := include "splitserve.workerConfig" (list $root $pool) -}}
{{- $selector := dict "root" $root "component" "worker" "pool" .name -}}
{{- $simulated := eq $pool.engine.kind "sim" -}}
{{- $base := ternary $values.image $values.workerImage $simulated -}}
{{- $image := include "splitserve.image" (list $root $base) -}}
{{- if or $pool.image.repository $pool.image.tag -}}
{{- $image = printf "%s:%s" (default $base.repository $pool.image.repository) (default $root.Chart.AppVersion $pool.image.tag) -}}
{{- end -}}
{{- $resources := include "splitserve.workerResources" (list $root $pool) | fromYaml -}}
{{- $rdma := and (eq $values.kvTransfer.transport "rdma") (not $simulated) -}}
{{- $affinity := dict -}}
{{- if $values.placement.sameNode -}}
{{- $affinity = include "splitserve.together" (dict "root" $root "component" "worker") | fromYaml -}}
{{- end -}}
metadata:
  {{- include "splitserve.podMetadata" (merge (dict "options" $pool "config" $config) $selector) | nindent 2 }}
spec:
  {{- include "splitserve.podPlace" (dict "root" $root "options" $pool "affinity" $affinity) | nindent 2 }}
  terminationGracePeriodSeconds: {{ include "splitserve.workerGrace" (list $root $pool) }}
  {{- with include "splitserve.download" (dict "root" $root "options" $pool "image" $image "pullPolicy" $base.pullPolicy "weights" true) }}
  initContainers:
    {{- . | trim | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ $image | quote }}
      imagePullPolicy: {{ $base.pullPolicy }}
      command: [splitserve]
      args:
        - worker
        - --config=/etc/splitserve/config/worker.yaml
        - --name=$(POD_NAME)
        {{- range $pool.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        {{- include "splitserve.env" (dict "options" $pool "env" (include "splitserve.workerEnv" (list $root $pool) | fromYamlArray)) | trim | nindent 8 }}
      ports:
        - {name: metrics, containerPort: 9400}
      {{- include "splitserve.probes" (list $root "metrics" $pool.startupTimeoutSeconds "/livez" "/readyz") | nindent 6 }}
      {{- with $resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- $security := deepCopy $values.securityContext }}
        {{- if and $rdma $values.kvTransfer.rdma.ipcLock }}
        {{- $security = include "splitserve.merged" (list $security (dict "capabilities" (dict "add" (list "IPC_LOCK")))) | fromYaml }}
        {{- end }}
        {{- toYaml $security | nindent 8 }}
      volumeMounts:
        {{- include "splitserve.mounts" (dict "root" $root "options" $pool "model" true) | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- with include "splitserve.workerTlsMount" $root }}{{ . | trim | nindent 8 }}{{ end }}
        {{- with include "splitserve.apiKeyMount" $root }}{{ . | trim | nindent 8 }}{{ end }}
  volumes:
    {{- include "splitserve.volumes" (dict "root" $root "options" $pool "config" (printf "%s-%s" $full .name) "model" true "cache" true) | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $pool.shmSize }}}
    {{- with include "splitserve.workerTlsVolume" $root }}{{ . | trim | nindent 4 }}{{ end }}
    {{- with include "splitserve.apiKeyVolume" (list $root $values.apiKeys.workerKey) }}{{ . | trim | nindent 4 }}{{ end }}
{{- end -}}

{{/* Takes (list $ pool): a list of variables. */}}
{{- define "splitserve.workerEnv" -}}
{{- $values := (index . 0).Values -}}{{- $pool := index . 1 -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: SPLITSERVE_KV_HOST
  value: $(POD_IP)
{{- if gt (int $pool.nodesPerWorker) 1 }}
{{- /* LeaderWorkerSet puts its own variables before these. */}}
- {name: SPLITSERVE_NODES, value: $(LWS_GROUP_SIZE)}
- {name: SPLITSERVE_NODE_RANK, value: $(LWS_WORKER_INDEX)}
- {name: SPLITSERVE_LEADER, value: $(LWS_LEADER_ADDRESS)}
{{- end }}
{{- if ne $pool.engine.kind "sim" }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- if eq $values.kvTransfer.transport "rdma" }}
- {name: UCX_TLS, value: "rc,sm,self,cuda_copy,cuda_ipc"}
{{- with $values.kvTransfer.rdma.netDevices }}
- {name: UCX_NET_DEVICES, value: {{ . | quote }}}
{{- end }}
{{- else if eq $values.kvTransfer.transport "tcp" }}
- {name: UCX_TLS, value: "tcp,sm,self,cuda_copy,cuda_ipc"}
{{- end }}
{{- end }}
{{- end -}}

{{/* Takes (list $ pool): what the pool says, and its GPUs and RDMA devices. */}}
{{- define "splitserve.workerResources" -}}
{{- $values := (index . 0).Values -}}{{- $pool := index . 1 -}}
{{- $resources := deepCopy $pool.resources -}}
{{- if ne $pool.engine.kind "sim" -}}
{{- $devices := dict -}}
{{- if $pool.gpuResource -}}
{{- $_ := set $devices $pool.gpuResource (div (mul $pool.parallelism.tensor $pool.parallelism.pipeline) $pool.nodesPerWorker) -}}
{{- end -}}
{{- if eq $values.kvTransfer.transport "rdma" -}}
{{- range $device, $count := $values.kvTransfer.rdma.resources }}{{- $_ := set $devices $device $count -}}{{- end -}}
{{- end -}}
{{- if $devices -}}
{{- $resources = include "splitserve.merged" (list (dict "limits" $devices) $resources) | fromYaml -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
