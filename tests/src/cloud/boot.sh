#!/bin/sh
# What a Debian image of a cloud does at boot, where systemd is not the first process: cloud-init's four stages with the
# instance's user data, then the services that are enabled, started again whenever they end.
set -eu
export LC_ALL=C.UTF-8

# What AWS calls the instance metadata service, version 2, for what a NoCloud seed doesn't tell.
cat >/run/metadata.json <<'METADATA'
@METADATA@
METADATA
if [ "$(cat /run/metadata.json)" != '{}' ]; then
    cat >/run/metadata.py <<'SERVER'
import http.server, json, secrets
values, token = json.load(open('/run/metadata.json')), secrets.token_hex(16)

class Service(http.server.BaseHTTPRequestHandler):
    def answer(self, status, text):
        self.send_response(status)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self):
        fits = self.path == '/latest/api/token' and 'X-aws-ec2-metadata-token-ttl-seconds' in self.headers
        self.answer(*((200, token) if fits else (400, '')))

    def do_GET(self):
        value = values.get(self.path.removeprefix('/latest/meta-data/'))
        if self.headers.get('X-aws-ec2-metadata-token') != token:
            self.answer(401, '')
        else:
            self.answer(*((404, '') if value is None else (200, value)))

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(('169.254.169.254', 80), Service).serve_forever()
SERVER
    ip address replace 169.254.169.254/32 dev lo
    python3 /run/metadata.py &
fi

# The image has cloud-init; its NoCloud seed stands in for the cloud's metadata service.
if [ ! -e /usr/bin/cloud-init ]; then
    tar -C "@CLOUD_INIT@" -cf - etc usr | tar -C / --keep-directory-symlink -xf -
    cat >/etc/cloud/cloud.cfg.d/90_image.cfg <<'CFG'
datasource_list: [NoCloud]
locale: C.UTF-8
network: {config: disabled}
manage_etc_hosts: false
ssh_deletekeys: false
ssh_genkeytypes: [ed25519]
CFG
    mkdir -p /var/lib/cloud/seed/nocloud
    printf 'instance-id: %s\nlocal-hostname: %s\n' "@INSTANCE@" "@HOSTNAME@" >/var/lib/cloud/seed/nocloud/meta-data
    base64 -d >/var/lib/cloud/seed/nocloud/user-data <<'USER_DATA'
@USER_DATA@
USER_DATA
    rm -rf /etc/systemd/system/multi-user.target.wants
    mkdir -p /etc/systemd/system/multi-user.target.wants
fi

# A host keeps the name that it had when its first boot was done; the machine under it would give it its own.
if [ -e /var/lib/hostname.kept ]; then
    hostname "$(cat /var/lib/hostname.kept)"
    cp /var/lib/hostname.kept /etc/hostname
fi

# As much of systemctl as first-boot scripts use.
cat >/usr/local/sbin/systemctl <<'SYSTEMCTL'
#!/bin/sh
case "$1" in
enable) shift; for unit; do case "$unit" in --*) ;; *)
    ln -sf "/etc/systemd/system/$unit" "/etc/systemd/system/multi-user.target.wants/$unit" ;;
    esac; done ;;
daemon-reload|start|restart|stop|reload|is-active|is-enabled|status|show) ;;
*) echo "systemctl $*: not in this image" >&2; exit 1 ;;
esac
SYSTEMCTL
chmod 755 /usr/local/sbin/systemctl
mkdir -p /run/systemd/system

# A stage that fails is told, and doesn't keep the next from running.
for stage in "init --local" init "modules --mode=config" "modules --mode=final"; do
    # shellcheck disable=SC2086
    cloud-init $stage || echo "cloud-init $stage ended with $?" >&2
done

hostname >/var/lib/hostname.kept

# `Restart=always`, `RestartSec=1`.
for unit in /etc/systemd/system/multi-user.target.wants/*.service; do
    [ -e "$unit" ] || continue
    command=$(sed -n 's/^ExecStart=//p' "$unit")
    while :; do
        status=0
        $command || status=$?
        echo "$unit ended with $status; it starts again" >&2
        sleep 1
    done &
done
# The services go on for as long as the machine runs; where there is none, the machine idles.
exec sleep infinity
