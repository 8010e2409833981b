{{- define "cxr.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .Values.scaling.scaleUpStabilizationSeconds }}
scaleDown:
  stabilizationWindowSeconds: {{ .Values.scaling.scaleDownStabilizationSeconds }}
{{- end }}
