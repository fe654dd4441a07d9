# OpenBao or HashiCorp Vault of compose.yaml: on disk, TLS with the certificate that make-secrets.sh made.
storage "raft" {
  path    = "/openbao/file"
  node_id = "one"
}

listener "tcp" {
  address       = "0.0.0.0:8200"
  tls_cert_file = "/run/secrets/vault-authority"
  tls_key_file  = "/run/secrets/vault-key"
}

api_addr      = "https://vault:8200"
cluster_addr  = "https://vault:8201"
disable_mlock = true
