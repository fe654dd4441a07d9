{{/* Refuses values that could not work, all problems at once. Called by the Deployments, so by each rendering. */}}

{{- define "broker.check" -}}
{{- $problems := concat (include "broker.checkValues" . | fromYamlArray) (include "broker.checkVault" . | fromYamlArray) (include "broker.checkNetwork" . | fromYamlArray) -}}
{{- if $problems -}}
{{- fail (printf "\n\nThese values cannot work (docs/deploy-kubernetes.md):\n  - %s\n" (join "\n  - " $problems)) -}}
{{- end -}}
{{- end -}}

{{- define "broker.checkValues" -}}
{{- $found := list -}}
{{- if not .Values.image.repository -}}
{{- $found = append $found "image.repository: name the image that was built from the Dockerfile" -}}
{{- end -}}
{{- if not .Values.publicUrl -}}
{{- $found = append $found "publicUrl: the https address under which browsers reach the broker" -}}
{{- end -}}
{{- if not .Values.database.existingSecret -}}
{{- $found = append $found "database.existingSecret: make a Secret that holds the postgresql:// URL, and name it" -}}
{{- end -}}
{{- if not (or .Values.keyring.existingSecret .Values.vault.transitKey) -}}
{{- $found = append $found "keyring.existingSecret: make a Secret that holds the keyring, and name it; or set vault.transitKey" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- $found = append $found "serviceAccount.name: with serviceAccount.create=false an existing one has to be named" -}}
{{- end -}}
{{- range $name := list "web" "public" "worker" -}}
{{- with index $.Values $name -}}
{{- if lt (int .terminationGraceSeconds) (add (int .drainSeconds) (int .graceSeconds) 15 | int) -}}
{{- $found = append $found (printf "%s.terminationGraceSeconds: at least drainSeconds, graceSeconds and 15 s for what is written at the end" $name) -}}
{{- end -}}
{{- if and .autoscaling.enabled (gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) -}}
{{- $found = append $found (printf "%s.autoscaling: minReplicas is more than maxReplicas" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{- define "broker.checkVault" -}}
{{- $found := list -}}
{{- with .Values.vault -}}
{{- if eq .fallback .store -}}
{{- $found = append $found "vault.fallback: another store than vault.store, or empty" -}}
{{- end -}}
{{- if include "broker.usesVault" $ -}}
{{- if not .address -}}
{{- $found = append $found "vault.address: Vault's URL, such as https://vault.example.com:8200" -}}
{{- end -}}
{{- if and (eq .auth "kubernetes") (not .kubernetes.role) -}}
{{- $found = append $found "vault.kubernetes.role: the role of Vault's Kubernetes method" -}}
{{- end -}}
{{- if and (eq .auth "approle") (not (and .approle.roleId .approle.existingSecret)) -}}
{{- $found = append $found "vault.approle: roleId, and an existingSecret that holds the secret id" -}}
{{- end -}}
{{- if and (eq .auth "token") (not .token.existingSecret) -}}
{{- $found = append $found "vault.token.existingSecret: a Secret that holds the token" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{- define "broker.checkNetwork" -}}
{{- $found := list -}}
{{- with .Values.networkPolicy -}}
{{- if .enabled -}}
{{- if not .postgresql.to -}}
{{- $found = append $found "networkPolicy.postgresql.to: peers that PostgreSQL is at, or networkPolicy.enabled=false" -}}
{{- end -}}
{{- if and (include "broker.usesVault" $) (not .vault.to) -}}
{{- $found = append $found "networkPolicy.vault.to: peers that Vault is at" -}}
{{- end -}}
{{- if and $.Values.redis.existingSecret (not .redis.to) -}}
{{- $found = append $found "networkPolicy.redis.to: peers that Redis is at" -}}
{{- end -}}
{{- if and $.Values.ingress.enabled (not .ingressController) -}}
{{- $found = append $found "networkPolicy.ingressController: peers that the ingress controller runs at, else nothing comes through it" -}}
{{- end -}}
{{- if and $.Values.serviceMonitor.enabled (not .monitoring) -}}
{{- $found = append $found "networkPolicy.monitoring: peers that Prometheus runs at, else it cannot read /metrics" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}
