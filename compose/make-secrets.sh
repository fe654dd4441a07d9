#!/bin/sh
# Writes compose/secrets, what compose.yaml needs and nobody else may know: sh compose/make-secrets.sh PUBLIC_URL
#
# Needs openssl. Made once; an installation that has its secrets keeps them. http:// is for trying on one machine and makes
# it a development broker, which says so; everything else takes https:// and a TLS proxy in front.
set -eu
umask 077
cd "$(dirname "$0")"

case ${1:-} in
  https://?*) mode=production ;;
  http://127.0.0.1:* | http://localhost:*) mode=development ;;
  *) echo "usage: sh compose/make-secrets.sh https://broker.example.com (or http://127.0.0.1:8000 to try)" >&2; exit 2 ;;
esac
if [ -e secrets ]; then
  echo "compose/secrets is there already; nothing was changed" >&2
  exit 1
fi

draft=$(mktemp -d ./secrets.XXXXXX)
trap 'rm -rf "$draft"' EXIT
new() { openssl rand -hex 32 | tr -d '\n'; }

postgres=$(new)
redis=$(new)
printf %s "$postgres" > "$draft/postgres-password"
new > "$draft/vault-secret-id"
# Limits are counted there and nothing else: what is lost with a restart is a second's count.
cat > "$draft/redis.conf" <<END
requirepass $redis
save ""
appendonly no
maxmemory 128mb
maxmemory-policy noeviction
END
cat > "$draft/broker.env" <<END
BROKER_ENV=$mode
BROKER_PUBLIC_URL=$1
BROKER_DATABASE_URL=postgresql+asyncpg://broker:$postgres@postgres:5432/broker
BROKER_REDIS_URL=redis://:$redis@redis:6379
BROKER_VAULT=hashicorp
BROKER_VAULT_TRANSIT_KEY=broker
BROKER_VAULT_AUTH=approle
BROKER_VAULT_ROLE_ID=broker
BROKER_VAULT_SECRET_ID_FILE=/run/secrets/vault-secret-id
VAULT_ADDR=https://vault:8200
VAULT_CACERT=/run/secrets/vault-authority
END
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=vault \
  -addext subjectAltName=DNS:vault -addext keyUsage=critical,digitalSignature,keyCertSign \
  -keyout "$draft/vault.key" -out "$draft/vault.crt" 2> /dev/null

# The directory keeps others out. The files have to be readable: compose hands them on with the owner and mode that they have
# here, and the programs in the containers are other users.
chmod 0644 "$draft"/*
mv "$draft" secrets
trap - EXIT
echo "compose/secrets is made; keep a copy of it apart from the backups of the data"
