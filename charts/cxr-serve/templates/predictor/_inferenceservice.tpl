{{/* One InferenceService of: root, name, track, storageUri, image (canary only), replicas, autoscaled. */}}
{{- define "cxr.inferenceService" -}}
{{- $v := .root.Values -}}
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "cxr.stableLabels" .root | nindent 4 }}
    app.kubernetes.io/component: predictor
    cxr-serve/track: {{ .track }}
    # KServe makes no route of its own: the chart's are the only way in.
    networking.kserve.io/visibility: cluster-local
  annotations:
    serving.kserve.io/deploymentMode: Standard
    # external: KServe leaves the replicas to this chart's autoscaler. none: it keeps minReplicas.
    serving.kserve.io/autoscalerClass: {{ ternary "external" "none" .autoscaled }}
    {{- with $v.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  predictor:
    {{- if not .autoscaled }}
    minReplicas: {{ .replicas }}
    {{- end }}
    deploymentStrategy:
      type: RollingUpdate
      rollingUpdate: {maxSurge: {{ $v.rollout.maxSurge }}, maxUnavailable: {{ $v.rollout.maxUnavailable }}}
    terminationGracePeriodSeconds: {{ include "cxr.terminationSeconds" .root }}
    serviceAccountName: {{ include "cxr.serviceAccountName" .root }}
    automountServiceAccountToken: false
    # Kubernetes would add variables for each Service, and one named cxr-rest would set CXR_REST_PORT.
    enableServiceLinks: false
    securityContext: {{- include "cxr.podSecurityContext" .root | nindent 6 }}
    {{- with $v.image.pullSecrets }}
    imagePullSecrets:
      {{- range . }}
      - name: {{ . }}
      {{- end }}
    {{- end }}
    {{- with $v.scheduling.nodeSelector }}
    nodeSelector: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $v.scheduling.tolerations }}
    tolerations: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $v.scheduling.affinity }}
    affinity: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $v.scheduling.topologySpread }}
    topologySpreadConstraints: {{- include "cxr.topologySpread" (dict "constraints" . "labels" (dict "serving.kserve.io/inferenceservice" $.name)) | indent 6 }}
    {{- end }}
    {{- with $v.scheduling.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    {{- with $v.scheduling.runtimeClassName }}
    runtimeClassName: {{ . }}
    {{- end }}
    {{- if ne $v.model.signature.policy "off" }}
    volumes:
      - name: verify-key
        configMap: {name: {{ include "cxr.verifyKeyName" .root }}}
    {{- end }}
    model:
      modelFormat: {name: cxr-mar, version: "1"}
      protocolVersion: v2
      runtime: {{ include "cxr.fullname" .root }}
      storageUri: {{ .storageUri | quote }}
      image: {{ include "cxr.image" (dict "root" .root "image" .image) | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      env: {{- include "cxr.env" .root | nindent 8 }}
      {{- if ne $v.model.signature.policy "off" }}
      volumeMounts:
        - {name: verify-key, mountPath: {{ include "cxr.verifyKeyFolder" .root }}, readOnly: true}
      {{- end }}
      # All of them: KServe fills in its own defaults where this is silent.
      resources: {{- include "cxr.resources" .root | nindent 8 }}
{{- end }}

{{- define "cxr.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.enabled -}}
{{- range $part := values $resources -}}
{{- $_ := set $part $.Values.gpu.resource ($.Values.gpu.count | toString) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{- define "cxr.env" -}}
{{- $server := .Values.server -}}
- {name: CXR_RUNTIME, value: {{ .Values.runtime }}}
- {name: CXR_QUALITY_POLICY, value: {{ .Values.model.guards.policy | quote }}}
- {name: CXR_REQUEST_TIMEOUT, value: {{ $server.requestTimeout | quote }}}
- {name: CXR_STARTUP_TIMEOUT, value: {{ $server.startupTimeout | quote }}}
- {name: CXR_DRAIN_DELAY, value: {{ $server.drainDelay | quote }}}
# The longest request may still end.
- {name: CXR_GRACE_PERIOD, value: {{ $server.requestTimeout | quote }}}
{{- with $server.workers }}
- {name: CXR_WORKERS, value: {{ . | quote }}}
{{- end }}
{{- with $server.maxBatch }}
- {name: CXR_MAX_BATCH, value: {{ . | quote }}}
{{- end }}
{{- with $server.maxQueue }}
- {name: CXR_MAX_QUEUE, value: {{ . | quote }}}
{{- end }}
{{- with $server.maxImageBytes }}
- {name: CXR_MAX_IMAGE_BYTES, value: {{ int64 . | quote }}}
{{- end }}
{{- with $server.maxImagePixels }}
- {name: CXR_MAX_IMAGE_PIXELS, value: {{ int64 . | quote }}}
{{- end }}
{{- with .Values.model.signature }}
{{- if ne .policy "off" }}
- {name: CXR_SIGNATURE_POLICY, value: {{ .policy }}}
- {name: CXR_VERIFY_KEY, value: {{ include "cxr.verifyKeyFolder" $ }}/{{ include "cxr.verifyKeyFile" $ }}}
{{- end }}
{{- end }}
- {name: CXR_LOG_FORMAT, value: {{ $server.logFormat }}}
- {name: CXR_ACCESS_LOG, value: {{ $server.accessLog | quote }}}
{{- with .Values.tracing }}
{{- if .enabled }}
- {name: CXR_TRACING, value: "true"}
{{ include "cxr.tracingEnv" (dict "root" $ "service" (include "cxr.fullname" $)) }}
{{- end }}
{{- end }}
{{- if $server.verbose }}
- {name: CXR_VERBOSE, value: "true"}
{{- end }}
{{- with $server.env }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}
