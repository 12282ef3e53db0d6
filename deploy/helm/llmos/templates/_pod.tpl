{{/*
The StatefulSet of a service. Takes a dict:
  root, service     as for the names
  replicas
  governing         the name of the Service that gives the pods their names
  startupSeconds    how long a start may take
  startupHealth     the health name that ends the start: "" is readiness
  ports             of the service's own: list of {name, port}
  env               of the service's own, by setting in lower case
  volumes           of the service's own: list of {name, mountPath, source}
  persistent        whether the state is on a claim

All are StatefulSets: a pod keeps its name and its volume, and with it its spool, database or model cache.
*/}}
{{- define "llmos.statefulset" -}}
{{- $root := .root -}}
{{- $service := .service -}}
{{- $values := index $root.Values $service -}}
{{- $prefix := printf "LLMOS_%s_" (upper $service) -}}
{{- $tls := $root.Values.tls -}}
{{- $drain := $root.Values.drain -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ include "llmos.name" . }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "llmos.labels" . | nindent 4 }}
spec:
  serviceName: {{ .governing }}
  replicas: {{ .replicas }}
  podManagementPolicy: Parallel
  selector:
    matchLabels:
      {{- include "llmos.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "llmos.labels" . | nindent 8 }}
      {{- with $values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "llmos.name" . }}
      automountServiceAccountToken: false
      # Otherwise Kubernetes adds variables such as LLMOS_GATEWAY_PORT, which look like settings.
      enableServiceLinks: false
      {{- with $root.Values.images.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      # The process drains by itself on SIGTERM: not ready, delay, running calls. No preStop hook is needed.
      terminationGracePeriodSeconds: {{ add (int $drain.delaySeconds) (int $drain.graceSeconds) 15 }}
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile:
          type: RuntimeDefault
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "llmos.selector" . | nindent 14 }}
      containers:
        - name: {{ $service }}
          image: {{ include "llmos.image" . | quote }}
          imagePullPolicy: {{ $root.Values.images.pullPolicy }}
          command: [python, -m, services.{{ $service }}]
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          ports:
            - name: grpc
              containerPort: {{ include "llmos.port" . }}
            - name: metrics
              containerPort: {{ include "llmos.metricsPort" . }}
            - name: probe
              containerPort: {{ include "llmos.probePort" . }}
            {{- range .ports }}
            - name: {{ .name }}
              containerPort: {{ .port }}
            {{- end }}
          env:
            - name: {{ $prefix }}INSTANCE
              valueFrom:
                fieldRef:
                  fieldPath: metadata.name
            {{- include "llmos.env" . | trim | nindent 12 }}
          startupProbe:
            grpc:
              port: {{ include "llmos.probePort" . }}
              service: {{ .startupHealth | quote }}
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: {{ div (int .startupSeconds) 2 }}
          readinessProbe:
            grpc:
              port: {{ include "llmos.probePort" . }}
              service: ""
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: 2
          livenessProbe:
            grpc:
              port: {{ include "llmos.probePort" . }}
              service: liveness
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          volumeMounts:
            - name: state
              mountPath: /var/lib/llmos
            - name: tmp
              mountPath: /tmp
            - name: service-secrets
              mountPath: /etc/llmos/secrets
              readOnly: true
            {{- if $tls.enabled }}
            - name: tls
              mountPath: /etc/llmos/tls
              readOnly: true
            {{- end }}
            {{- range .volumes }}
            - name: {{ .name }}
              mountPath: {{ .mountPath }}
              readOnly: true
            {{- end }}
      volumes:
        - name: tmp
          emptyDir:
            sizeLimit: 1Gi
        - name: service-secrets
          secret:
            secretName: {{ include "llmos.serviceSecrets" $root }}
            defaultMode: 0440
            items:
              {{- range (ternary (list "gateway" "auth" "inference" "logging") (list $service) (eq $service "auth")) }}
              - {key: {{ . }}, path: {{ . }}}
              {{- end }}
        {{- if $tls.enabled }}
        - name: tls
          secret:
            secretName: {{ default (printf "%s-tls" (include "llmos.name" .)) (index $tls.secretNames $service) }}
            defaultMode: 0440
        {{- end }}
        {{- range .volumes }}
        - name: {{ .name }}
          {{- toYaml .source | nindent 10 }}
        {{- end }}
        {{- if not .persistent }}
        - name: state
          emptyDir:
            sizeLimit: {{ $values.storage.size }}
        {{- end }}
  {{- if .persistent }}
  volumeClaimTemplates:
    - metadata:
        name: state
        labels:
          {{- include "llmos.selector" . | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $values.storage.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ $values.storage.size }}
  {{- end }}
{{- end -}}

{{/* The environment: what all services are told, then the service's own, then the values' settings. */}}
{{- define "llmos.env" -}}
{{- $root := .root -}}
{{- $service := .service -}}
{{- $prefix := printf "LLMOS_%s_" (upper $service) -}}
{{- $settings := dict
  "listen_host" "0.0.0.0"
  "grpc_port" (include "llmos.port" .)
  "metrics_port" (include "llmos.metricsPort" .)
  "probe_port" (include "llmos.probePort" .)
  "state_dir" "/var/lib/llmos/state"
  "log_format" "json"
  "log_level" $root.Values.telemetry.logLevel
  "trace_sample_ratio" $root.Values.telemetry.traceSampleRatio
  "drain_delay_s" $root.Values.drain.delaySeconds
  "drain_grace_s" $root.Values.drain.graceSeconds
  "issuer" $root.Values.issuer
  "auth_target" (include "llmos.target" (dict "root" $root "service" "auth"))
  "service_secret_file" (printf "/etc/llmos/secrets/%s" $service)
-}}
{{- with $root.Values.telemetry.otlpEndpoint -}}
{{- $_ := set $settings "otlp_endpoint" . -}}
{{- end -}}
{{- if $root.Values.tls.enabled -}}
{{- $_ := set $settings "tls_cert_file" "/etc/llmos/tls/tls.crt" -}}
{{- $_ := set $settings "tls_key_file" "/etc/llmos/tls/tls.key" -}}
{{- $_ := set $settings "tls_ca_file" "/etc/llmos/tls/ca.crt" -}}
{{- else -}}
{{- $_ := set $settings "allow_plaintext" true -}}
{{- end -}}
{{- $settings = merge (dict) .env (index $root.Values $service).settings $settings -}}
{{- range $name := keys $settings | sortAlpha }}
- name: {{ $prefix }}{{ upper $name }}
  {{- $value := index $settings $name }}
  {{- /* Numbers come as floats, whose text would be 1e+06. */}}
  {{- if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value = int64 $value }}{{ end }}
  value: {{ $value | toString | quote }}
{{- end -}}
{{- end -}}
