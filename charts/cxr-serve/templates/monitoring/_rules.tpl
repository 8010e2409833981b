{{/* What rules, alerts and dashboards are rendered with, beside what every template knows. `[[ ]]` in their files
     stands for Prometheus' own braces. */}}
{{- define "cxr.rules.context" -}}
{{- $name := include "cxr.fullname" . -}}
{{- $windows := list .Values.monitoring.slo.period -}}
{{- range .Values.monitoring.slo.burnRates -}}
{{- $windows = concat $windows (list .long .short) -}}
{{- end -}}
name: {{ $name }}
services: {{ $name }}|{{ include "cxr.canaryName" . }}
series: namespace="{{ .Release.Namespace }}", service=~"{{ $name }}|{{ include "cxr.canaryName" . }}"
portal: namespace="{{ .Release.Namespace }}", service="{{ include "cxr.portal.name" . }}"
stable: namespace="{{ .Release.Namespace }}", service="{{ $name }}"
methods: predict|infer|explain
failures: 5..|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|INTERNAL|UNKNOWN
hosts: {{ include "cxr.hosts" . | fromJsonArray | join "|" | replace "." "[.]" | quote }}
mayBeAbsent: {{ and (eq .Values.scaling.type "keda") .Values.scaling.keda.scaleToZero }}
windows: {{ uniq $windows | toJson }}
{{- end }}

{{/* The list of rules of one file: dict "root" $ "path" PATH. */}}
{{- define "cxr.rules.file" -}}
{{- $own := include "cxr.rules.context" .root | fromYaml -}}
{{- $context := merge $own (dict "Values" .root.Values "Release" .root.Release "Template" .root.Template) -}}
{{- tpl (.root.Files.Get .path) $context | replace "[[" "{{" | replace "]]" "}}" -}}
{{- end }}
