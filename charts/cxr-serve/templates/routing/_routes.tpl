{{/* The rules of a route, of: root, port, timeout (HTTPRoute only). */}}
{{- define "cxr.routeRules" -}}
{{- $stable := printf "%s-predictor" (include "cxr.fullname" .root) -}}
{{- $canary := printf "%s-predictor" (include "cxr.canaryName" .root) -}}
{{- $values := .root.Values.canary -}}
{{- if $values.enabled -}}
- matches:
    - headers:
        - {name: {{ $values.header.name }}, value: {{ $values.header.value | quote }}}
  backendRefs:
    - {name: {{ $canary }}, port: {{ .port }}}
  {{- with .timeout }}
  timeouts: {request: {{ . }}}
  {{- end }}
{{ end -}}
- backendRefs:
    {{- if $values.enabled }}
    - {name: {{ $stable }}, port: {{ .port }}, weight: {{ sub 100 (int $values.weight) }}}
    - {name: {{ $canary }}, port: {{ .port }}, weight: {{ $values.weight }}}
    {{- else }}
    - {name: {{ $stable }}, port: {{ .port }}}
    {{- end }}
  {{- with .timeout }}
  timeouts: {request: {{ . }}}
  {{- end }}
{{- end }}
