#!/bin/busybox sh
# The first program of a host that kprov boots over the network. It finds the host's network, tells the boot server how it fares, and
# either writes an image to a disk (kprov.mode=install) or runs the host from memory (kprov.mode=memory).
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /run /tmp /etc /var/lib /root /mnt
/bin/busybox --install -s /bin
# Where the kernel looks for it.
ln -sf /bin/busybox /sbin/modprobe
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts 2>/dev/null

value() {
    for word in $(cat /proc/cmdline); do
        case $word in "$1="*) echo "${word#*=}"; return ;; esac
    done
}
server=$(value kprov.server)
mac=$(value kprov.mac)
mode=$(value kprov.mode)
disk=$(value kprov.disk)

say() { echo "kprov: $*" >/dev/console; }
report() {
    say "$*"
    for try in 1 2 3; do
        timeout 15 wget -q -O /dev/null --post-data "$*" "$server/hosts/$mac/report" && return
        say "the boot server does not answer"
        sleep 1
    done
}
# What cannot go on says so for ever: a host that restarts by itself would hide why.
fail() {
    while :; do
        report "failed: $*"
        sleep 30
    done
}

# Drivers for what is there; some devices appear only once the one that they're connected to has its driver.
for round in 1 2 3; do
    find /sys/devices -name modalias -exec cat {} + 2>/dev/null | sort -u | xargs modprobe -q -a 2>/dev/null
done
for module in af_packet ext4 vfat xfs overlay sd_mod; do modprobe -q $module 2>/dev/null; done

# The interface that the firmware booted from.
interface=
for try in 1 2 3 4 5 6 7 8 9 10; do
    for path in /sys/class/net/*; do
        [ "$(cat "$path/address" 2>/dev/null)" = "$(echo "$mac" | tr - :)" ] && interface=${path##*/}
    done
    [ -n "$interface" ] && break
    sleep 1
done
[ -n "$interface" ] || { say "no interface has the address $mac"; sleep 30; reboot -f; }
ip link set lo up
ip link set "$interface" up

cat >/bin/kprov-dhcp <<'SCRIPT'
#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip address replace "$ip/$mask" dev "$interface"
for gateway in $router; do ip route replace default via "$gateway"; break; done
: >/etc/resolv.conf
for address in $dns; do echo "nameserver $address" >>/etc/resolv.conf; done
[ -n "$hostname" ] && hostname "$hostname"
exit 0
SCRIPT
chmod 755 /bin/kprov-dhcp
until udhcpc -q -n -t 5 -T 2 -i "$interface" -s /bin/kprov-dhcp >/dev/null 2>&1; do say "no address by DHCP yet"; done
report "started"

until timeout 60 wget -q -O /tmp/first-boot "$server/hosts/$mac/first-boot"; do
    say "there is no first-boot data for this host yet"
    sleep 2
done

if [ "$mode" = memory ]; then
    # The first root file system cannot be pivoted from, which container runtimes do.
    mkdir -p /new
    mount -t tmpfs -o mode=755,size=80% root /new
    cp -a /bin /sbin /usr /etc /lib /lib64 /root /var /new/ 2>/dev/null
    mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp /new/mnt
    chmod 1777 /new/tmp
    cp /tmp/first-boot /new/first-boot
    chmod 700 /new/first-boot
    report "running from memory"
    for place in proc sys dev; do mount --move /$place /new/$place; done
    exec switch_root /new /bin/sh -c 'mount -t tmpfs run /run
        mkdir -p /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
        while :; do
            /first-boot
            echo "kprov: first-boot data ended, again in 5 s"
            sleep 5
        done'
fi

# The disk, by name or by what its stable path has in it: there is no udev here that would give it that path.
[ -n "$disk" ] || fail "no disk was named"
device=
for path in /sys/block/*; do
    name=${path##*/}
    case $name in loop* | ram* | zram* | sr* | dm-* | md*) continue ;; esac
    if [ "$disk" = "/dev/$name" ]; then device=/dev/$name; fi
    for file in "$path/serial" "$path/device/serial" "$path/wwid" "$path/device/wwid"; do
        word=$(tr -d ' \n' 2>/dev/null <"$file")
        word=${word##*.}
        if [ ${#word} -ge 4 ]; then case $disk in *"$word"*) device=/dev/$name ;; esac; fi
    done
done
[ -n "$device" ] || fail "the disk $disk is not here; there are: $(ls /sys/block | tr '\n' ' ')"
# What holds something is not kprov's to overwrite. File systems, volume groups and partition tables have their marks in the first
# megabytes or in the last one.
size=$(cat "/sys/block/${device#/dev/}/size")
held=$({ dd if="$device" bs=1M count=4; dd if="$device" bs=512 skip=$((size > 2048 ? size - 2048 : 0)); } 2>/dev/null | tr -d '\000' | wc -c)
if [ "$(value kprov.wipe)" != yes ] && [ "$held" != 0 ]; then fail "the disk $device holds something already"; fi

report "writing the image to $device"
mkfifo /tmp/image
sha256sum </tmp/image >/tmp/written &
wget -q -O - "$server/image" | tee /tmp/image | dd of="$device" bs=1M 2>/tmp/dd || fail "the image cannot be written"
wait
sync
written=$(cut -d ' ' -f 1 /tmp/written)
wanted=$(wget -q -O - "$server/image.sha256")
[ "$written" = "$wanted" ] || fail "what was written is $written, not $wanted"

# First-boot data, where cloud-init looks for them (its NoCloud data source).
blockdev --rereadpt "$device" 2>/dev/null
sleep 1
root=
for part in "$device"p[0-9]* "$device"[0-9]* "$device"; do
    [ -b "$part" ] || continue
    mount "$part" /mnt 2>/dev/null || continue
    if [ -d /mnt/etc ] && [ -d /mnt/usr ]; then root=$part; break; fi
    umount /mnt
done
[ -n "$root" ] || fail "the image has no file system with /etc and /usr that can be mounted here"
seed=/mnt/var/lib/cloud/seed/nocloud
mkdir -p "$seed"
cp /tmp/first-boot "$seed/user-data"
chmod 600 "$seed/user-data"
name=$(value kprov.name)
printf 'instance-id: kprov-%s-%s\nlocal-hostname: %s\n' "$name" "$(date +%s)" "$name" >"$seed/meta-data"
sync
umount /mnt
report "installed"
sync
sleep 1
reboot -f
