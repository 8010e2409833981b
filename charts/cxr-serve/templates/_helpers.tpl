{{/* Names. Room for "-canary", KServe's "-predictor" and the ReplicaSet's hash, within 63 characters. */}}
{{- define "cxr.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 35 | trimSuffix "-" }}
{{- end }}

{{- define "cxr.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 35 | trimSuffix "-" }}
{{- else if contains (include "cxr.name" .) .Release.Name }}
{{- .Release.Name | trunc 35 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "cxr.name" .) | trunc 35 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "cxr.canaryName" -}}
{{ include "cxr.fullname" . }}-canary
{{- end }}

{{- define "cxr.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "cxr.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "cxr.labels" -}}
{{ include "cxr.stableLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels without a version: KServe hands those of the InferenceService on to the pods, and a change
     would restart them all. */}}
{{- define "cxr.stableLabels" -}}
{{ include "cxr.selectorLabels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "cxr.selectorLabels" -}}
app.kubernetes.io/name: {{ include "cxr.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The server's ports, as server/cxr_server/settings.py has them. KServe makes the first one the
     port 80 of its Service, and gives the others their own number. */}}
{{- define "cxr.ports.rest" -}}8080{{- end }}
{{- define "cxr.ports.grpc" -}}8081{{- end }}
{{- define "cxr.ports.metrics" -}}8082{{- end }}
{{- define "cxr.servicePorts.rest" -}}80{{- end }}

{{/* The image of: dict "root" $ "image" (tag and digest that differ from the values', or nil). */}}
{{- define "cxr.image" -}}
{{- $image := .root.Values.image -}}
{{- $own := .image | default dict -}}
{{- $digest := $own.digest | default (ternary "" $image.digest (not (empty $own.tag))) -}}
{{- $tag := $own.tag | default $image.tag | default .root.Chart.AppVersion -}}
{{- $image.repository }}{{ if $digest }}@{{ $digest }}{{ else }}:{{ $tag }}{{ end }}
{{- end }}

{{/* Seconds from SIGTERM to SIGKILL: new requests are taken, the longest one ends, the rest stops. */}}
{{- define "cxr.terminationSeconds" -}}
{{- add (ceil .Values.server.drainDelay) (ceil .Values.server.requestTimeout) 15 -}}
{{- end }}

{{/* How pods are spread: dict "constraints" LIST "labels" (what tells them from others). */}}
{{- define "cxr.topologySpread" -}}
{{- $labels := .labels -}}
{{- range .constraints }}
- topologyKey: {{ .topologyKey }}
  whenUnsatisfiable: {{ .whenUnsatisfiable }}
  maxSkew: {{ .maxSkew | default 1 }}
  labelSelector: {matchLabels: {{ $labels | toJson }}}
  # Each revision by itself, or an upgrade would leave it lopsided.
  matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}

{{/* OpenTelemetry's own variables: dict "root" $ "service" (its name in traces). */}}
{{- define "cxr.tracingEnv" -}}
{{- $tracing := .root.Values.tracing -}}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ $tracing.endpoint | quote }}}
- {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ $tracing.samplingRatio | quote }}}
- {name: OTEL_SERVICE_NAME, value: {{ .service }}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: k8s.namespace.name={{ .root.Release.Namespace }}}
{{- end }}

{{- define "cxr.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "cxr.podSecurityContext" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Peers that requests come from, as a list of NetworkPolicyPeer. */}}
{{- define "cxr.gatewayPeers" -}}
{{- $peers := .Values.networkPolicy.gatewayPeers -}}
{{- if and (not $peers) (eq .Values.routing.type "gateway") -}}
{{- $names := list -}}
{{- range .Values.routing.gateway.parentRefs -}}
{{- $names = append $names (default $.Release.Namespace .namespace) -}}
{{- end -}}
{{- range $names | uniq -}}
{{- $peers = append $peers (dict "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" .))) -}}
{{- end -}}
{{- end -}}
{{- toYaml $peers -}}
{{- end }}

{{/* A way out that every pod needs: DNS. */}}
{{- define "cxr.dnsEgress" -}}
- to: {{- toYaml .Values.networkPolicy.dnsPeers | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{/* All host names of the routes, as JSON. Each Ingress lists them: where they share a Secret, cert-manager asks for
     one certificate, with the names of whichever Ingress comes first. */}}
{{- define "cxr.hosts" -}}
{{- $portal := ternary .Values.portal.host "" .Values.portal.enabled -}}
{{- compact (list .Values.routing.host .Values.routing.grpcHost $portal) | toJson -}}
{{- end }}

{{/* A way out to URLs: dict "urls" LIST "ports" LIST (without any: the URLs' own) "peers" LIST (without any: every
     address). */}}
{{- define "cxr.egressTo" -}}
{{- $ports := .ports | default (list) -}}
{{- if not $ports -}}
{{- range .urls -}}
{{- $url := urlParse . -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) -}}
{{- $ports = append $ports ($port | default (ternary "443" "80" (eq $url.scheme "https"))) -}}
{{- end -}}
{{- end -}}
- ports:
    {{- range uniq $ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .peers }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Named after its content, so that another key starts new pods. */}}
{{- define "cxr.verifyKeyName" -}}
{{ include "cxr.fullname" . | trunc 50 | trimSuffix "-" }}-key-{{ sha256sum .Values.model.signature.publicKey | trunc 8 }}
{{- end }}
{{- define "cxr.verifyKeyFolder" -}}/etc/cxr/verify{{- end }}
{{- define "cxr.verifyKeyFile" -}}key.pem{{- end }}
