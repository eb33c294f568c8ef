{{- define "llmdrop.labels" -}}
app.kubernetes.io/name: llmdrop
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The words after `llmdrop serve`, which are the same on every node. */}}
{{- define "llmdrop.words" -}}
- {{ .Values.model.path | quote }}
{{- with .Values.model.name }}
- --served-model-name
- {{ . | quote }}
{{- end }}
{{- with .Values.mask.dropAttention }}
- {{ printf "--drop-attention=%s" (toString .) | quote }}
{{- end }}
{{- with .Values.mask.dropMlp }}
- {{ printf "--drop-mlp=%s" (toString .) | quote }}
{{- end }}
{{- if .Values.keysSecret }}
- --api-key-file=/keys/keys
{{- end }}
- --shutdown-timeout
- {{ .Values.shutdownSeconds | quote }}
{{- range .Values.args }}
- {{ toString . | quote }}
{{- end }}
{{- end }}

{{/* A pod; `worker` is true for the second and later nodes of a replica, which answer nobody. */}}
{{- define "llmdrop.pod" -}}
{{- $worker := .worker }}
{{- with .root }}
metadata:
  labels: {{- include "llmdrop.labels" . | nindent 4 }}
    app.kubernetes.io/component: {{ ternary "worker" "server" $worker }}
  {{- if not $worker }}
  {{- with .Values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
spec:
  # Streams are finished first: a moment more than the server itself waits.
  terminationGracePeriodSeconds: {{ add .Values.shutdownSeconds 30 }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    runAsNonRoot: true
    runAsUser: 2000
    runAsGroup: 0
    fsGroup: 0
    seccompProfile: {type: RuntimeDefault}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: server
      image: "{{ required "image.repository: where the image of docker/Dockerfile was pushed to" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        {{- include "llmdrop.words" . | nindent 8 }}
        {{- if gt (int .Values.nodes) 1 }}
        - --nnodes
        - {{ .Values.nodes | quote }}
        - --node-rank
        - $(LWS_WORKER_INDEX)
        - --master-addr
        - $(LWS_LEADER_ADDRESS)
        {{- if $worker }}
        - --headless
        {{- end }}
        {{- end }}
      {{- with .Values.env }}
      env: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .Values.envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if not $worker }}
      ports:
        - {name: http, containerPort: 8000}
      # Until it has passed once the others are not asked.
      startupProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 12
        failureThreshold: {{ div (add .Values.startupSeconds 9) 10 }}
      # The server itself waits ten seconds for its engine.
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 15
        timeoutSeconds: 12
        failureThreshold: 3
      readinessProbe:
        httpGet: {path: /ready, port: http}
        periodSeconds: 5
        timeoutSeconds: 12
      {{- end }}
      resources:
        requests: {{- toYaml .Values.resources.requests | nindent 10 }}
        limits:
          {{- with .Values.resources.limits }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
          {{- if .Values.gpus }}
          nvidia.com/gpu: {{ .Values.gpus | quote }}
          {{- end }}
      securityContext:
        readOnlyRootFilesystem: true
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: home, mountPath: /home/llmdrop}
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if .Values.model.claim }}
        - {name: model, mountPath: /model, readOnly: true}
        {{- end }}
        {{- if .Values.keysSecret }}
        - {name: keys, mountPath: /keys, readOnly: true}
        {{- end }}
  volumes:
    - {name: home, emptyDir: {sizeLimit: {{ .Values.cacheSize }}}}
    - {name: tmp, emptyDir: {}}
    - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}}
    {{- with .Values.model.claim }}
    - name: model
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
    {{- with .Values.keysSecret }}
    - name: keys
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
