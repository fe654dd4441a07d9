#!/bin/sh
# Makes OpenBao or HashiCorp Vault ready for the broker (docs/vault.md, steps 2 to 4), then unseals it whenever it is sealed.
#
# Each step may be run again. Reads VAULT_ADDR and VAULT_CACERT; keeps the unseal key and the root token in KEYS.
set -eu
umask 077
KEYS=${KEYS:-/keys} READY=${READY:-/tmp/ready} SECRET_ID=${SECRET_ID:-/run/secrets/vault-secret-id}
POLICY=${POLICY:-/keeper/vault-policy.hcl}
rm -f "$READY"

status() { # prints unsealed, sealed or away
  vault status > /dev/null 2>&1 && echo unsealed && return
  [ $? -eq 2 ] && echo sealed || echo away
}

initialize() {
  vault operator init -key-shares=1 -key-threshold=1 > "$KEYS/init.new"
  mv "$KEYS/init.new" "$KEYS/init" # both are in one file: never one without the other
}

from_init() { sed -n "s/^$1: //p" "$KEYS/init" | tr -d '\n'; }

unseal() {
  from_init 'Unseal Key 1' > /tmp/unseal-key # not an argument: those stand in the list of processes
  vault write sys/unseal key=@/tmp/unseal-key > /dev/null || echo "Vault could not be unsealed" >&2
  rm -f /tmp/unseal-key
}

prepare() {
  vault read sys/mounts/secret > /dev/null 2>&1 || vault secrets enable -path=secret -version=2 kv
  until vault read secret/config > /dev/null 2>&1; do sleep 0.5; done
  vault write secret/config cas_required=true max_versions=5
  vault read sys/mounts/transit > /dev/null 2>&1 || vault secrets enable transit
  vault read transit/keys/broker > /dev/null 2>&1 || vault write -f transit/keys/broker > /dev/null
  vault policy write broker "$POLICY"
  vault read sys/auth/approle > /dev/null 2>&1 || vault auth enable approle
  vault write auth/approle/role/broker token_policies=broker token_no_default_policy=true token_ttl=20m token_max_ttl=24h
  vault write auth/approle/role/broker/role-id role_id=broker
  vault write auth/approle/role/broker/secret-id/lookup "secret_id=@$SECRET_ID" | grep -q creation_time ||
    vault write auth/approle/role/broker/custom-secret-id "secret_id=@$SECRET_ID" > /dev/null
}

until [ "$(status)" != away ]; do sleep 0.5; done
vault operator init -status > /dev/null 2>&1 || [ $? -ne 2 ] || initialize
if [ ! -s "$KEYS/init" ]; then
  echo "Vault has been initialized already, and its keys are not in $KEYS" >&2
  exit 1
fi
VAULT_TOKEN=$(from_init 'Initial Root Token')
export VAULT_TOKEN
until vault token lookup > /dev/null 2>&1; do
  [ "$(status)" != sealed ] || unseal
  sleep 0.5
done
prepare
touch "$READY"
echo "Vault is ready for the broker"
while sleep 2; do
  [ "$(status)" != sealed ] || unseal
done
