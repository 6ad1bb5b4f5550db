#!/bin/sh
# Written by kprov. Puts kprov-node on this machine and starts it; safe to run at every boot.
set -eu
urls="@URLS@"
sha256="@SHA256@"
directory=/usr/local/bin
# Flatcar's /usr is read-only; it looks for programs in /opt/bin as well.
if ! { mkdir -p "$directory" && : >"$directory/.kprov"; } 2>/dev/null; then
    directory=/opt/bin
    mkdir -p "$directory"
fi
rm -f "$directory/.kprov"
binary=$directory/kprov-node

fetch() {
    if command -v curl >/dev/null 2>&1; then curl -fsS --retry 5 --retry-connrefused -o "$2" "$1"
    elif command -v wget >/dev/null 2>&1; then wget -q -O "$2" "$1"
    else python3 -c 'import sys,urllib.request; urllib.request.urlretrieve(sys.argv[1], sys.argv[2])' "$1" "$2"
    fi
}

# A machine that was set up keeps its own copy, which may have been updated since.
if [ ! -e /var/lib/kprov/initialised ]; then
    mkdir -p /etc/kprov /var/lib/kprov
    chmod 700 /etc/kprov /var/lib/kprov
    until echo "$sha256  $binary" | sha256sum -c >/dev/null 2>&1; do
        for url in $urls; do
            if fetch "$url/@PATH@" "$binary.new" && echo "$sha256  $binary.new" | sha256sum -c >/dev/null; then
                chmod 755 "$binary.new"
                mv "$binary.new" "$binary"
                break
            fi
            echo "kprov: kprov-node could not be fetched from $url, trying again" >&2
            sleep 1
        done
    done
    umask 077
    cat >@CONFIG_PATH@.new <<'KPROV_CONFIG'
@CONFIG@
KPROV_CONFIG
    mv @CONFIG_PATH@.new @CONFIG_PATH@
    umask 022
fi

if [ -d /run/systemd/system ]; then
    cat >/etc/systemd/system/kprov-node.service <<KPROV_UNIT
[Unit]
Description=kprov node: containerd, kubelet and the local API front
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=$binary run
Restart=always
RestartSec=1
KillMode=process
Delegate=yes
LimitNOFILE=1048576
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
KPROV_UNIT
    systemctl daemon-reload
    systemctl enable --now kprov-node.service
else
    exec "$binary" run
fi
