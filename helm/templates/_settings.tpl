{{/* The broker's settings as variables, and the files that they name. Every secret is a reference to one that exists. */}}

{{/* What every process needs to read its settings at all, the migration too. */}}
{{- define "broker.baseEnv" -}}
- name: BROKER_PUBLIC_URL
  value: {{ .Values.publicUrl | quote }}
- name: BROKER_DATA_DIR
  value: /tmp/broker
- name: BROKER_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ .Values.database.existingSecret }}
      key: {{ .Values.database.key }}
{{- if .Values.database.ca.existingConfigMap }}
- name: PGSSLROOTCERT
  value: /etc/broker/database-ca/ca.crt
{{- end }}
{{- if .Values.keyring.existingSecret }}
- name: BROKER_KEYRING_FILE
  value: /etc/broker/keyring/keyring
{{- end }}
{{- with .Values.vault.transitKey }}
- name: BROKER_VAULT_TRANSIT_KEY
  value: {{ . | quote }}
{{- end }}
{{- include "broker.vaultEnv" . }}
{{- end -}}

{{- define "broker.vaultEnv" -}}
{{- if include "broker.usesVault" . }}
{{- with .Values.vault }}
- name: BROKER_VAULT
  value: {{ .store }}
- name: VAULT_ADDR
  value: {{ .address | quote }}
- name: BROKER_VAULT_AUTH
  value: {{ .auth }}
{{- $optional := dict "BROKER_VAULT_FALLBACK" .fallback "VAULT_NAMESPACE" .namespace "BROKER_VAULT_MOUNT" .mount "BROKER_VAULT_PREFIX" .prefix "BROKER_VAULT_TRANSIT_MOUNT" .transitMount "BROKER_VAULT_AUTH_MOUNT" (ternary "" .authMount (eq .auth "token")) }}
{{- range $name, $value := $optional }}
{{- if $value }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- if .ca.existingConfigMap }}
- name: VAULT_CACERT
  value: /etc/broker/vault-ca/ca.crt
{{- end }}
{{- if eq .auth "kubernetes" }}
- name: BROKER_VAULT_KUBERNETES_ROLE
  value: {{ .kubernetes.role | quote }}
- name: BROKER_VAULT_KUBERNETES_TOKEN_FILE
  value: /etc/broker/vault-login/token
{{- else if eq .auth "approle" }}
- name: BROKER_VAULT_ROLE_ID
  value: {{ .approle.roleId | quote }}
- name: BROKER_VAULT_SECRET_ID_FILE
  value: /etc/broker/vault-login/secret-id
{{- else }}
- name: VAULT_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .token.existingSecret }}
      key: {{ .token.key }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* What processes that serve or work need besides. */}}
{{- define "broker.servingEnv" -}}
{{- with .Values.redis }}
{{- if .existingSecret }}
- name: BROKER_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- with .Values.adminKey }}
{{- if .existingSecret }}
- name: BROKER_ADMIN_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- if .Values.integrationsFile.existingSecret }}
- name: BROKER_INTEGRATIONS_FILE
  value: /etc/broker/integrations/{{ .Values.integrationsFile.key }}
{{- end }}
{{- if .Values.trustedIssuers.existingConfigMap }}
- name: BROKER_TRUSTED_ISSUERS_FILE
  value: /etc/broker/issuers/{{ .Values.trustedIssuers.key }}
{{- end }}
{{- if .Values.egressCa.existingConfigMap }}
- name: BROKER_EGRESS_CA_FILE
  value: /etc/broker/egress-ca/ca.crt
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: BROKER_{{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Files: (list of name, kind, existing name, key, file). A Secret's are readable by the broker's group alone. */}}
{{- define "broker.files" -}}
{{- with .Values -}}
- [keyring, secret, {{ .keyring.existingSecret | quote }}, {{ .keyring.key | quote }}, keyring]
- [database-ca, configMap, {{ .database.ca.existingConfigMap | quote }}, {{ .database.ca.key | quote }}, ca.crt]
- [integrations, secret, {{ .integrationsFile.existingSecret | quote }}, {{ .integrationsFile.key | quote }}, {{ .integrationsFile.key | quote }}]
- [issuers, configMap, {{ .trustedIssuers.existingConfigMap | quote }}, {{ .trustedIssuers.key | quote }}, {{ .trustedIssuers.key | quote }}]
- [egress-ca, configMap, {{ .egressCa.existingConfigMap | quote }}, {{ .egressCa.key | quote }}, ca.crt]
{{- if include "broker.usesVault" $ }}
- [vault-ca, configMap, {{ .vault.ca.existingConfigMap | quote }}, {{ .vault.ca.key | quote }}, ca.crt]
{{- if eq .vault.auth "approle" }}
- [vault-login, secret, {{ .vault.approle.existingSecret | quote }}, {{ .vault.approle.key | quote }}, secret-id]
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "broker.volumes" -}}
- name: scratch
  emptyDir:
    sizeLimit: 256Mi
{{- range include "broker.files" . | fromYamlArray }}
{{- if index . 2 }}
- name: {{ index . 0 }}
  {{- if eq (index . 1) "secret" }}
  secret:
    secretName: {{ index . 2 }}
    defaultMode: 0440
  {{- else }}
  configMap:
    name: {{ index . 2 }}
    defaultMode: 0444
  {{- end }}
    items:
      - key: {{ index . 3 }}
        path: {{ index . 4 }}
{{- end }}
{{- end }}
{{- if include "broker.vaultByServiceAccount" . }}
- name: vault-login
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          audience: {{ .Values.vault.kubernetes.audience | quote }}
          expirationSeconds: {{ .Values.vault.kubernetes.expirationSeconds }}
{{- end }}
{{- end -}}

{{- define "broker.mounts" -}}
- name: scratch
  mountPath: /tmp
{{- range include "broker.files" . | fromYamlArray }}
{{- if index . 2 }}
- name: {{ index . 0 }}
  mountPath: /etc/broker/{{ index . 0 }}
  readOnly: true
{{- end }}
{{- end }}
{{- if include "broker.vaultByServiceAccount" . }}
- name: vault-login
  mountPath: /etc/broker/vault-login
  readOnly: true
{{- end }}
{{- end -}}
