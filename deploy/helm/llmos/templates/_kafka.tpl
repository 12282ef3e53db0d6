{{/* What the services that speak to Kafka are told, by setting. */}}
{{- define "llmos.kafkaEnv" -}}
{{- with .Values.kafka -}}
kafka_bootstrap_servers: {{ .bootstrapServers | quote }}
kafka_topic_prefix: {{ .topicPrefix | quote }}
kafka_security_protocol: {{ .securityProtocol }}
kafka_partitions: {{ .partitions }}
kafka_replication: {{ .replication }}
{{- if hasPrefix "SASL" .securityProtocol }}
kafka_sasl_mechanism: {{ .saslMechanism }}
kafka_sasl_username: {{ .saslUsername | quote }}
kafka_sasl_password_file: /etc/llmos/kafka/password
{{- end }}
{{- if .privateAuthority }}
kafka_ca_file: /etc/llmos/kafka/ca.crt
{{- end }}
{{- if .clientCertificate }}
kafka_cert_file: /etc/llmos/kafka/tls.crt
kafka_key_file: /etc/llmos/kafka/tls.key
{{- end }}
{{- end -}}
{{- end -}}

{{/* The volume of their Secret, where there is one. */}}
{{- define "llmos.kafkaVolumes" -}}
{{- with .Values.kafka.existingSecret -}}
- name: kafka
  mountPath: /etc/llmos/kafka
  source:
    secret:
      secretName: {{ . }}
      defaultMode: 0440
{{- else -}}
[]
{{- end -}}
{{- end -}}
