{{/* The Service of a service that only others of the mesh call; `headless` where they choose the replica. */}}
{{- define "llmos.internalService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "llmos.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "llmos.labels" . | nindent 4 }}
spec:
  {{- if .headless }}
  clusterIP: None
  # Readiness is the callers' own business: they watch the health of each replica.
  publishNotReadyAddresses: true
  {{- end }}
  selector:
    {{- include "llmos.selector" . | nindent 4 }}
  ports:
    - name: grpc
      port: {{ include "llmos.port" . }}
      targetPort: grpc
    - name: metrics
      port: {{ include "llmos.metricsPort" . }}
      targetPort: metrics
{{- end -}}
