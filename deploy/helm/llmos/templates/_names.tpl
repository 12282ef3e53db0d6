{{/* Names and labels. */}}

{{- define "llmos.fullname" -}}
{{- if contains "llmos" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-llmos" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of one service; takes (dict "root" $ "service" "gateway"), as the others below. */}}
{{- define "llmos.name" -}}
{{- printf "%s-%s" (include "llmos.fullname" .root) .service -}}
{{- end -}}

{{- define "llmos.selector" -}}
app.kubernetes.io/name: llmos
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .service }}
{{- end -}}

{{- define "llmos.labels" -}}
{{ include "llmos.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end -}}

{{- define "llmos.image" -}}
{{- $images := .root.Values.images -}}
{{- with $images.registry }}{{ trimSuffix "/" . }}/{{ end -}}
llmos-{{ .service }}:{{ default .root.Chart.AppVersion $images.tag }}
{{- end -}}

{{/* host:port of a service: the full name, which certificates and resolvers of all kinds agree on. */}}
{{- define "llmos.target" -}}
{{- printf "%s.%s.svc:%d" (include "llmos.name" .) .root.Release.Namespace (include "llmos.port" . | int) -}}
{{- end -}}

{{- define "llmos.port" -}}
{{- get (dict "gateway" 50050 "auth" 50051 "inference" 50052 "logging" 50053) .service -}}
{{- end -}}

{{- define "llmos.metricsPort" -}}
{{- add 1000 (include "llmos.port" . | int) -}}
{{- end -}}

{{/* Health in plain text, on a port of its own: a kubelet has no client certificate. */}}
{{- define "llmos.probePort" -}}
{{- add 2000 (include "llmos.port" . | int) -}}
{{- end -}}

{{/* Every inference replica by its own name: the gateway balances and fails over between them itself. */}}
{{- define "llmos.inferenceTargets" -}}
{{- $name := include "llmos.name" (dict "root" . "service" "inference") -}}
{{- $target := include "llmos.target" (dict "root" . "service" "inference") -}}
{{- $targets := list -}}
{{- range $index := until (int .Values.inference.replicas) -}}
{{- $targets = append $targets (printf "%s-%d.%s" $name $index $target) -}}
{{- end -}}
{{- join "," $targets -}}
{{- end -}}

{{- define "llmos.serviceSecrets" -}}
{{- default (printf "%s-service-secrets" (include "llmos.fullname" .)) .Values.serviceSecrets.existingSecret -}}
{{- end -}}
