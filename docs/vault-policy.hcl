# What the broker needs from HashiCorp Vault or OpenBao, and nothing else. See vault.md.
#
# The names are the defaults: `secret` is BROKER_VAULT_MOUNT, `broker` is BROKER_VAULT_PREFIX, `transit` is
# BROKER_VAULT_TRANSIT_MOUNT and the key `broker` is BROKER_VAULT_TRANSIT_KEY. Leave out the part that you do not use.

# --- BROKER_VAULT=hashicorp: secrets in KV version 2, one path for each connection and client secret.

# Read a version, add one.
path "secret/data/broker/*" {
  capabilities = ["create", "read", "update"]
}

# Set cas_required and max_versions, list, see times and versions; delete an owner with all its versions.
path "secret/metadata/broker/*" {
  capabilities = ["create", "read", "update", "delete", "list"]
}

# Check at the start that the mount does not delete versions by itself.
path "secret/config" {
  capabilities = ["read"]
}

# --- BROKER_VAULT_TRANSIT_KEY: Transit wraps the data keys of the database.

# `update` and not `create`: Transit would make a key that does not exist.
path "transit/encrypt/broker" {
  capabilities = ["update"]
}

path "transit/decrypt/broker" {
  capabilities = ["update"]
}

# See which versions there are.
path "transit/keys/broker" {
  capabilities = ["read"]
}

# `broker keys rotate encryption` makes the next version. Leave it out if you rotate the key yourselves.
path "transit/keys/broker/rotate" {
  capabilities = ["update"]
}

# --- The broker's own token: what Vault's default policy allows too.

path "auth/token/lookup-self" {
  capabilities = ["read"]
}

path "auth/token/renew-self" {
  capabilities = ["update"]
}

# A token that came from a login is revoked at the end of the process.
path "auth/token/revoke-self" {
  capabilities = ["update"]
}
