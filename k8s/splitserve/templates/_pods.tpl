{{/* What pods have in common. */}}

{{/* Takes (dict "root" $ "options" poolOrRouter "component" ... "config" text): a pod's metadata. */}}
{{- define "splitserve.podMetadata" -}}
labels:
  {{- include "splitserve.labels" . | nindent 2 }}
  {{- with .options.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/config: {{ .config | sha256sum }}
  {{- with .options.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Where it may run, and as whom. Takes (dict "root" $ "options" ... "affinity" its own unless options say one). */}}
{{- define "splitserve.podPlace" -}}
serviceAccountName: {{ include "splitserve.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .options.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .options.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .options.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with (default .affinity .options.affinity) }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .options.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .options.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Takes (dict "root" $ "options" ... "env" list): the chart's variables and those of the values, which win. */}}
{{- define "splitserve.env" -}}
{{- $said := dict -}}
{{- range .options.extraEnv }}{{- $_ := set $said .name true -}}{{- end -}}
{{- range .env }}
{{- if not (hasKey $said .name) }}
- {{ toYaml . | nindent 2 | trim }}
{{- end }}
{{- end }}
- name: HOME
  value: /home/splitserve
{{- with .options.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "splitserve.mounts" -}}
- {name: config, mountPath: /etc/splitserve/config, readOnly: true}
- {name: home, mountPath: /home/splitserve}
- {name: tmp, mountPath: /tmp}
{{- if .model }}
{{- with include "splitserve.modelMount" .root }}{{ . | trim | nindent 0 }}{{ end }}
{{- end }}
{{- with .options.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Takes (dict "root" $ "options" ... "config" its ConfigMap's name "model" whether it reads the model "cache" whether it has
the workers' model cache). */}}
{{- define "splitserve.volumes" -}}
- name: config
  configMap: {name: {{ .config }}}
- name: home
  emptyDir: {}
- name: tmp
  emptyDir: {}
{{- if .model }}
{{- with include "splitserve.modelVolume" . }}{{ . | trim | nindent 0 }}{{ end }}
{{- end }}
{{- with .options.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "splitserve.modelMount" -}}
{{- if ne .Values.model.source "demo" }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "splitserve.modelVolume" -}}
{{- $model := .root.Values.model -}}
{{- if eq $model.source "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ $model.pvc.claimName }}, readOnly: true}
{{- else if eq $model.source "hostPath" }}
- name: model
  hostPath: {path: {{ $model.hostPath.path }}, type: Directory}
{{- else if eq $model.source "hub" }}
- name: model
  {{- if .cache }}
  {{- toYaml $model.hub.cache | nindent 2 }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Takes (dict "root" $ "options" ... "image" reference "pullPolicy" ... "weights" whether they are needed): the init container
that downloads the model. Who finds it there already downloads nothing. */}}
{{- define "splitserve.download" -}}
{{- $model := .root.Values.model -}}
{{- if eq $model.source "hub" }}
- name: download
  image: {{ .image | quote }}
  imagePullPolicy: {{ .pullPolicy }}
  command: [python3, -c]
  args:
    - |
      import os
      from huggingface_hub import snapshot_download
      snapshot_download(os.environ["REPOSITORY"], revision=os.environ["REVISION"], local_dir=os.environ["DIRECTORY"],
                        allow_patterns=os.environ["FILES"].split(","), ignore_patterns=os.environ["NOT"].split(","))
  env:
    - {name: HOME, value: /home/splitserve}
    - {name: REPOSITORY, value: {{ default $model.name $model.hub.repository | quote }}}
    - {name: REVISION, value: {{ $model.hub.revision | quote }}}
    - {name: DIRECTORY, value: {{ include "splitserve.modelDirectory" .root | quote }}}
    - {name: FILES, value: {{ join "," $model.hub.files | quote }}}
    - {name: NOT, value: {{ ternary "original/*" "original/*,*.safetensors,*.bin" .weights | quote }}}
    {{- with $model.hub.endpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- with $model.hub.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ . }}, key: {{ $model.hub.tokenSecret.key }}}
    {{- end }}
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: home, mountPath: /home/splitserve}
    - {name: tmp, mountPath: /tmp}
    - {name: model, mountPath: /models}
{{- end }}
{{- end -}}

{{/* Certificates and keys. Each takes (dict "root" $ ...); what is not set gives nothing. */}}
{{- define "splitserve.serverTlsVolume" -}}
{{- if ne .Values.tls.mode "none" }}
- name: tls
  secret: {secretName: {{ include "splitserve.serverSecret" . }}}
{{- end }}
{{- end -}}
{{- define "splitserve.serverTlsMount" -}}
{{- if ne .Values.tls.mode "none" }}
- {name: tls, mountPath: /etc/splitserve/tls, readOnly: true}
{{- end }}
{{- end -}}
{{- define "splitserve.workerTlsVolume" -}}
{{- if ne .Values.tls.mode "none" }}
- name: worker-tls
  secret: {secretName: {{ include "splitserve.workerSecret" . }}}
{{- end }}
{{- end -}}
{{- define "splitserve.workerTlsMount" -}}
{{- if ne .Values.tls.mode "none" }}
- {name: worker-tls, mountPath: /etc/splitserve/worker-tls, readOnly: true}
{{- end }}
{{- end -}}
{{/* Takes (list $ key): one key of the Secret alone. */}}
{{- define "splitserve.apiKeyVolume" -}}
{{- $root := index . 0 -}}{{- $key := index . 1 -}}
{{- with $root.Values.apiKeys.secretName }}
- name: api-keys
  secret:
    secretName: {{ . }}
    items: [{key: {{ $key }}, path: {{ $key }}}]
{{- end }}
{{- end -}}
{{- define "splitserve.apiKeyMount" -}}
{{- if .Values.apiKeys.secretName }}
- {name: api-keys, mountPath: /etc/splitserve/api-keys, readOnly: true}
{{- end }}
{{- end -}}

{{/* Takes (list $ port startupSeconds livePath readyPath). */}}
{{- define "splitserve.probes" -}}
{{- $root := index . 0 -}}{{- $port := index . 1 -}}{{- $start := index . 2 -}}
{{- $scheme := include "splitserve.scheme" $root | upper -}}
startupProbe:
  httpGet: {path: {{ index . 3 }}, port: {{ $port }}, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: {{ $root.Values.probes.liveness.timeoutSeconds }}
  failureThreshold: {{ divf $start 5 | ceil | int64 }}
livenessProbe:
  httpGet: {path: {{ index . 3 }}, port: {{ $port }}, scheme: {{ $scheme }}}
  {{- toYaml $root.Values.probes.liveness | nindent 2 }}
readinessProbe:
  httpGet: {path: {{ index . 4 }}, port: {{ $port }}, scheme: {{ $scheme }}}
  {{- toYaml $root.Values.probes.readiness | nindent 2 }}
{{- end -}}

{{- define "splitserve.preStop" -}}
{{- if . }}
lifecycle:
  preStop:
    exec: {command: [sleep, {{ . | toString | quote }}]}
{{- end }}
{{- end -}}
