{{/* Combinations that cannot work end the rendering with a sentence. */}}

{{- define "llmos.check" -}}
{{- if not .Values.kafka.bootstrapServers -}}
{{- fail "kafka.bootstrapServers is required: the host:port of your Kafka, which this chart does not install." -}}
{{- end -}}
{{- with .Values.kafka -}}
{{- $sasl := hasPrefix "SASL" .securityProtocol -}}
{{- if and $sasl (not (and .saslUsername .existingSecret)) -}}
{{- fail (printf "kafka.securityProtocol %s needs kafka.saslUsername, and kafka.existingSecret with the key password." .securityProtocol) -}}
{{- end -}}
{{- if and .saslUsername (not $sasl) -}}
{{- fail (printf "kafka.saslUsername is of no use with kafka.securityProtocol %s." .securityProtocol) -}}
{{- end -}}
{{- if or .privateAuthority .clientCertificate -}}
{{- if not (hasSuffix "SSL" .securityProtocol) -}}
{{- fail (printf "kafka.privateAuthority and kafka.clientCertificate are of no use with kafka.securityProtocol %s." .securityProtocol) -}}
{{- end -}}
{{- if not .existingSecret -}}
{{- fail "kafka.privateAuthority and kafka.clientCertificate need kafka.existingSecret, which has the files." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (not .Values.tls.enabled) (not .Values.tls.allowPlaintext) -}}
{{- fail "tls.enabled is false: set tls.allowPlaintext to true as well if the network itself encrypts, as a service mesh does." -}}
{{- end -}}
{{- if and .Values.tls.enabled .Values.tls.allowPlaintext -}}
{{- fail "tls.enabled and tls.allowPlaintext exclude each other: set one of them to false." -}}
{{- end -}}
{{- with .Values.auth -}}
{{- if and (gt (int .replicas) 1) (not .database.url) -}}
{{- fail "auth.replicas is more than 1: SQLite has room for one process, so set auth.database.url to a PostgreSQL." -}}
{{- end -}}
{{- if and .database.existingSecret (not .database.url) -}}
{{- fail "auth.database.existingSecret is of no use without auth.database.url." -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway -}}
{{- if and .redis.existingSecret (not .redis.url) -}}
{{- fail "gateway.redis.existingSecret is of no use without gateway.redis.url." -}}
{{- end -}}
{{- end -}}
{{- range $service := list "gateway" "auth" "inference" "logging" -}}
{{- $made := splitList "," (include "llmos.madeSettings" $) -}}
{{- range $name, $value := (index $.Values $service).settings -}}
{{- if has $name $made -}}
{{- fail (printf "%s.settings.%s is made by the chart: change the value that it comes from instead." $service $name) -}}
{{- end -}}
{{- if regexMatch "(secret|password|token|api_key)$" $name -}}
{{- fail (printf "%s.settings.%s: secrets do not belong into values; use the setting that names a file." $service $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The settings that the chart makes, for any service. */}}
{{- define "llmos.madeSettings" -}}
allow_plaintext,auth_target,db_password_file,db_url,drain_delay_s,drain_grace_s,grpc_port,http_port,inference_targets,instance,issuer,kafka_bootstrap_servers,kafka_ca_file,kafka_cert_file,kafka_key_file,kafka_partitions,kafka_replication,kafka_sasl_mechanism,kafka_sasl_password_file,kafka_sasl_username,kafka_security_protocol,kafka_topic_prefix,key_encryption_key_file,listen_host,load_timeout_s,log_format,log_level,logging_target,metrics_port,models_dir,otlp_endpoint,payload_key_file,probe_port,public_url,redis_password_file,redis_url,replicas,service_secret_file,service_secrets_dir,state_dir,tls_ca_file,tls_cert_file,tls_key_file,trace_sample_ratio,trusted_proxies
{{- end -}}
