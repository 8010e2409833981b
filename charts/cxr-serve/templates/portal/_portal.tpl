{{- define "cxr.portal.name" -}}
{{ include "cxr.fullname" . }}-portal
{{- end }}

{{/* The headless Service of the predictor's gRPC, by which the portal finds each replica. */}}
{{- define "cxr.portal.modelName" -}}
{{ include "cxr.portal.name" . }}-model
{{- end }}

{{- define "cxr.portal.selectorLabels" -}}
{{ include "cxr.selectorLabels" . }}
app.kubernetes.io/component: portal
{{- end }}

{{- define "cxr.portal.labels" -}}
{{ include "cxr.labels" . }}
app.kubernetes.io/component: portal
{{- end }}

{{/* As portal/cxr_portal/settings.py has them. */}}
{{- define "cxr.portal.ports.http" -}}8090{{- end }}
{{- define "cxr.portal.ports.metrics" -}}8092{{- end }}

{{- define "cxr.portal.image" -}}
{{- $image := .Values.portal.image -}}
{{- $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "cxr.portal.serviceAccountName" -}}
{{- $account := .Values.portal.serviceAccount -}}
{{- $account.name | default (ternary (include "cxr.portal.name" .) "default" $account.create) -}}
{{- end }}

{{- define "cxr.portal.claimName" -}}
{{- .Values.portal.database.volume.existingClaim | default (include "cxr.portal.name" .) -}}
{{- end }}

{{- define "cxr.portal.databaseFolder" -}}/var/lib/cxr-portal{{- end }}
{{- define "cxr.portal.databaseCaFolder" -}}/etc/cxr/database{{- end }}

{{/* Names under which it may be called: from outside, in the cluster, and by a port-forward or a probe. */}}
{{- define "cxr.portal.allowedHosts" -}}
{{- $service := include "cxr.portal.name" . -}}
{{- $own := list .Values.portal.host $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) "localhost" "127.0.0.1" -}}
{{- concat (compact $own) .Values.portal.allowedHosts | uniq | join " " -}}
{{- end }}

{{- define "cxr.portal.env" -}}
{{- $portal := .Values.portal -}}
{{- with $portal.database -}}
{{- if .secret -}}
- name: CXR_PORTAL_DATABASE
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .secretKey }}}}
{{- if .caSecret }}
# libpq's, for what the URL leaves open.
- {name: PGSSLROOTCERT, value: {{ include "cxr.portal.databaseCaFolder" $ }}/ca.crt}
{{- end }}
{{- else -}}
- {name: CXR_PORTAL_DATABASE, value: "sqlite:///{{ include "cxr.portal.databaseFolder" $ }}/portal.db"}
{{- end }}
{{- end }}
{{- with $portal.rateStorage }}
{{- if .secret }}
- name: CXR_PORTAL_RATE_STORAGE
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .secretKey }}}}
{{- end }}
{{- end }}
# All addresses of the name, by turns: a Service's one address would be one replica.
- {name: CXR_PORTAL_SERVER, value: "dns:///{{ include "cxr.portal.modelName" . }}.{{ .Release.Namespace }}:{{ include "cxr.ports.grpc" . }}"}
- {name: CXR_PORTAL_MODEL, value: {{ $portal.model | quote }}}
# As long as the server may take.
- {name: CXR_PORTAL_TIMEOUT, value: {{ .Values.server.requestTimeout | quote }}}
- {name: CXR_PORTAL_DRAIN_DELAY, value: {{ .Values.server.drainDelay | quote }}}
{{- with .Values.server.maxImageBytes }}
- {name: CXR_PORTAL_MAX_IMAGE_BYTES, value: {{ int64 . | quote }}}
{{- end }}
- {name: CXR_PORTAL_ALLOWED_HOSTS, value: {{ include "cxr.portal.allowedHosts" . | quote }}}
{{- with $portal.corsOrigins }}
- {name: CXR_PORTAL_CORS_ORIGINS, value: {{ join " " . | quote }}}
{{- end }}
- {name: CXR_PORTAL_AUTH, value: {{ $portal.auth.policy | quote }}}
{{- with $portal.auth.oidc }}
{{- if .issuer }}
- {name: CXR_PORTAL_OIDC_ISSUER, value: {{ .issuer | quote }}}
- {name: CXR_PORTAL_OIDC_AUDIENCE, value: {{ .audience | quote }}}
{{- with .jwksUrl }}
- {name: CXR_PORTAL_OIDC_JWKS, value: {{ . | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $key := dict "MAX_IMAGES" "maxImages" "MAX_JOB_IMAGES" "maxJobImages" "MAX_ACTIVE_JOBS" "maxActiveJobs" "IMAGES_PER_MINUTE" "imagesPerMinute" "MAX_IN_FLIGHT" "maxInFlight" "JOB_WORKERS" "jobWorkers" }}
{{- $value := index $portal.limits $key }}
{{- if not (kindIs "invalid" $value) }}
- {name: CXR_PORTAL_{{ $name }}, value: {{ int64 $value | quote }}}
{{- end }}
{{- end }}
- {name: CXR_PORTAL_RETENTION_HOURS, value: {{ $portal.retentionHours | quote }}}
- {name: CXR_PORTAL_LOG_FORMAT, value: {{ $portal.logFormat }}}
{{- if .Values.tracing.enabled }}
- {name: CXR_PORTAL_TRACING, value: "true"}
{{ include "cxr.tracingEnv" (dict "root" . "service" (include "cxr.portal.name" .)) }}
{{- end }}
{{- with $portal.env }}
{{ toYaml . }}
{{- end }}
{{- end }}
