# The steps that kprov makes on a host by SSH, as root. Each can be run again. Answers are name=value lines between two marks.
set -u
umask 077
LC_ALL=C
PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
export LC_ALL PATH
etc=/etc/kprov
state=/var/lib/kprov
binary=/usr/local/bin/kprov-node
pidfile=/run/kprov-node.pid
log=/var/log/kprov-node.log

say() { printf '%s=%s\n' "$1" "$2"; }
fail() { printf 'KPROV-FAIL %s\n' "$*"; exit 40; }
line_of() { [ -f "$1" ] && tr -d '\n' <"$1"; }
has_systemd() { [ -d /run/systemd/system ]; }

# When a process started, in clock ticks since boot; nothing for one that has ended (proc(5)).
start_of() {
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    set -- ${stat##*) }
    [ "$1" != Z ] && echo "${20}"
}

runs() {
    if has_systemd; then
        case $(systemctl is-active kprov-node.service 2>/dev/null) in active | activating | reloading) return 0 ;; esac
        return 1
    fi
    [ -f "$pidfile" ] || return 1
    read -r pid started <"$pidfile" || return 1
    [ -n "$started" ] && [ "$(start_of "$pid")" = "$started" ]
}

# What is here that kprov-node would clash with.
in_use() {
    ls -l /proc/[0-9]*/exe 2>/dev/null | sed -n 's/.* -> //p' | sed 's/ (deleted)$//; s#.*/##' | sort -u |
        grep -xE 'kubelet|containerd|dockerd|crio|k3s|rke2'
    for directory in /etc/kubernetes /var/lib/etcd /var/lib/kubelet; do
        [ -n "$(ls -A "$directory" 2>/dev/null)" ] && echo "$directory"
    done
    return 0
}

facts() {
    say arch "$(uname -m)"
    say kernel "$(uname -r)"
    say os "$(. /etc/os-release 2>/dev/null; echo "${PRETTY_NAME:-unknown}")"
    say cpus "$(getconf _NPROCESSORS_ONLN 2>/dev/null)"
    say memory "$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo)"
    if has_systemd; then say init systemd; else say init none; fi
    if runs; then say running yes; else say running no; fi
    say machine "$(line_of $etc/machine.json)"
    say disk "$(line_of $etc/disk.json)"
    say addresses "$(ip -o -4 address show 2>/dev/null | awk '{ sub("/.*", "", $4); printf "%s ", $4 }')"
    say source "$(ip -o -4 route get 192.0.2.1 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')"
    missing=
    for program in ip mount blkid sha256sum setsid; do
        command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
    done
    command -v iptables >/dev/null 2>&1 || command -v nft >/dev/null 2>&1 || missing="$missing iptables"
    say missing "${missing# }"
    if [ ! -f $etc/machine.json ]; then
        say inuse "$(in_use | tr '\n' ' ')"
        for left in $binary /etc/systemd/system/kprov-node.service; do
            [ -e "$left" ] && say left "$left"
        done
        # Machines of the local provider are not of this kind.
        [ -f $etc/disk.json ] || [ -z "$(ls -A $state 2>/dev/null | grep -vx local)" ] || say left $state
    fi
    return 0
}

# The disks there are, and the stable names they have.
disks() {
    command -v lsblk >/dev/null 2>&1 || fail "there is no \`lsblk\` to find disks with"
    lsblk -Pbdo NAME,TYPE,SIZE,RO,MODEL,SERIAL | while read -r line; do say device "$line"; done
    for link in /dev/disk/by-id/*; do
        [ -e "$link" ] || continue
        case $link in *-part[0-9]*) continue ;; esac
        say link "$link $(readlink -f "$link")"
    done
    return 0
}

# What a disk holds: `used|...` where it is in use, `free|...` where it can be wiped, nothing where it is empty.
holds() {
    name=${1##*/}
    all="$1 $(lsblk -nro PATH "$1" 2>/dev/null | tr '\n' ' ')"
    for part in $all; do
        place=$(awk -v part="$part" '$1 == part { print $2; exit }' /proc/mounts)
        [ -n "$place" ] && { echo "used|\`$part\` is mounted at \`$place\`"; return; }
        grep -q "^$part " /proc/swaps 2>/dev/null && { echo "used|\`$part\` is swap space"; return; }
        held=$(ls "/sys/class/block/${part##*/}/holders" 2>/dev/null | tr '\n' ' ')
        [ -n "$held" ] && { echo "used|\`$part\` is part of ${held% }"; return; }
    done
    parts=$(lsblk -nro NAME "$1" 2>/dev/null | sed 1d | tr '\n' ' ')
    [ -n "$parts" ] && { echo "free|partitions ${parts% }"; return; }
    found=$(blkid -p -o value -s TYPE "$1" 2>/dev/null; blkid -p -o value -s PTTYPE "$1" 2>/dev/null)
    [ -n "$found" ] && {
        label=$(blkid -p -o value -s LABEL "$1" 2>/dev/null)
        echo "free|$(echo "$found" | tr '\n' ' ' | sed 's/ $//')${label:+ with the label \`$label\`}"
        return
    }
    # Up to where the first partition of a disk would have its superblock.
    [ "$(head -c 2097152 "$1" | tr -d '\0' | head -c 1 | wc -c)" -gt 0 ] && echo "free|data that is not zero at its beginning"
    return 0
}

# Leaves nothing on a disk that anybody would take for data.
blank() {
    for part in $(lsblk -nro PATH "$1" 2>/dev/null | grep -vxF "$1" | sort -r) "$1"; do
        [ -b "$part" ] || continue
        command -v wipefs >/dev/null 2>&1 && wipefs -a -q -f "$part" >/dev/null 2>&1
        dd if=/dev/zero of="$part" bs=1M count=1 conv=fsync 2>/dev/null || fail "\`$part\` can't be written"
    done
    dd if=/dev/zero of="$1" bs=1M seek=1 count=1 conv=fsync 2>/dev/null
    command -v blockdev >/dev/null 2>&1 && blockdev --rereadpt "$1" 2>/dev/null
    return 0
}

put_file() {
    mkdir -p "${1%/*}"
    cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1" || fail "\`$1\` can't be written"
}

# DEVICE: sets `real` to the kernel's name of a block device.
resolve() {
    real=$(readlink -f "$1")
    [ -b "$real" ] || fail "there is no block device \`$1\`"
}

# Whether a block device is a whole disk. That gets a partition; a partition, or a volume made of others, is used as it is.
whole() {
    [ -e "/sys/class/block/${1##*/}" ] && [ ! -e "/sys/class/block/${1##*/}/partition" ] || return 1
    case ${1##*/} in dm-* | md*) return 1 ;; esac
}

# DEVICE: what it is.
kind() {
    resolve "$1"
    say device "$real"
    if whole "$real"; then say whole yes; else say whole no; fi
}

# DEVICE: whether a disk is there and empty.
look() {
    resolve "$1"
    what=$(holds "$real")
    [ -z "$what" ] || fail "disk $1|$what"
    can_format "$1"
}

# A disk is partitioned here, and kprov-node formats it.
can_format() {
    for program in sfdisk mkfs.ext4; do
        command -v $program >/dev/null 2>&1 || fail "there is no \`$program\` to partition and format \`$1\` with"
    done
}

# DISK PARTITION: makes one partition of all of an empty disk.
partition() {
    # Type: Linux file system data (https://uapi-group.org/specifications/specs/discoverable_partitions_specification/).
    printf 'label: gpt\ntype=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=kprov-data\n' |
        sfdisk -q --wipe always --wipe-partitions always "$1" >/dev/null 2>&1 || fail "\`sfdisk\` can't partition \`$1\`"
    # For kernels that read no partition tables by themselves.
    command -v partx >/dev/null 2>&1 && partx -u "$1" >/dev/null 2>&1
    # In a container's `/dev` nobody makes nodes.
    numbers=$(for one in "/sys/class/block/${1##*/}"/*/partition; do cat "${one%/partition}/dev" 2>/dev/null; done)
    if ! grep -q '^[^ ]* /dev devtmpfs ' /proc/mounts && [ ! -b "$2" ] && [ -n "$numbers" ]; then
        mknod "$2" b "${numbers%:*}" "${numbers#*:}"
    fi
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        [ -b "$2" ] && return
        sleep 0.5
    done
    fail "partition \`$2\` of \`$1\` does not appear"
}

# DEVICE PARTITION WIPE MARKER: takes a disk (`-` for a directory of the root file system) as this machine's data disk, with one
# partition (`-` for none).
claim() {
    if [ "$1" = - ]; then
        mkdir -p $etc $state/data
    else
        resolve "$1"
        can_format "$1"
        if [ ! -f $etc/disk.json ]; then
            what=$(holds "$real")
            case $what in
                "") ;;
                used*) fail "disk $1|$what" ;;
                *)
                    [ "$3" = wipe ] || fail "disk $1|$what"
                    blank "$real"
                    ;;
            esac
        fi
        mkdir -p $etc
    fi
    printf '%s\n' "$4" | put_file $etc/disk.json 600
    # The marker comes first: a disk with a partition on it and no marker would be somebody else's.
    if [ "$2" != - ] && [ -z "$(holds "$real")" ]; then partition "$real" "$2"; fi
}

# DEVICE: gives the data disk back, empty.
release() {
    if [ "$1" = - ]; then
        rm -rf $state/data
    elif [ -b "$(readlink -f "$1")" ]; then
        real=$(readlink -f "$1")
        case $(holds "$real") in used*) fail "disk $1|$(holds "$real")" ;; "") ;; *) blank "$real" ;; esac
    fi
    rm -f $etc/disk.json
    rmdir $etc $state 2>/dev/null
    return 0
}

# DIGEST: whether this kprov-node is here already.
has() {
    if echo "$1  $binary" | sha256sum -c >/dev/null 2>&1; then say here yes; else say here no; fi
}

# DIGEST: kprov-node on standard input.
put() {
    mkdir -p "${binary%/*}"
    cat >"$binary.new" || fail "\`$binary\` can't be written"
    echo "$1  $binary.new" | sha256sum -c >/dev/null 2>&1 || { rm -f "$binary.new"; fail "kprov-node arrived damaged"; }
    chmod 755 "$binary.new" && mv "$binary.new" "$binary"
}

# What was here before, so that it can be left as found.
remember() {
    [ -d $etc/before ] && return
    mkdir -p $etc/before.new
    for path in /etc/containerd /etc/containerd/config.toml /etc/containerd/certs.d /etc/cni /etc/cni/net.d /etc/kubernetes /var/lib/etcd /var/lib/kubelet \
        /var/lib/containerd /var/lib/cni /usr/libexec/kubernetes /var/log/pods /var/log/containers /var/log/kubernetes /run/containerd /run/nri /run/netns /opt/cni; do
        # A directory that is empty ends in a slash.
        if [ -d "$path" ] && [ -z "$(ls -A "$path")" ]; then echo "$path/"; elif [ -e "$path" ]; then echo "$path"; fi
    done >$etc/before.new/paths
    for setting in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops net/ipv4/ip_forward \
        net/bridge/bridge-nf-call-iptables fs/inotify/max_user_instances; do
        [ -r "/proc/sys/$setting" ] && echo "$setting $(cat "/proc/sys/$setting")"
    done >$etc/before.new/sysctl
    [ -f /etc/containerd/config.toml ] && cp -p /etc/containerd/config.toml $etc/before.new/containerd.toml
    mv $etc/before.new $etc/before
}

# MARKER: first-boot data on standard input. Marks the host, and starts what the data start.
install() {
    mkdir -p $etc
    chmod 700 $etc
    remember
    script=/run/kprov-first-boot.$$
    cat >"$script" || fail "first-boot data can't be written"
    case $(head -n 1 "$script") in '#!/bin/sh'*) ;; *) rm -f "$script"; fail "first-boot data are no shell script" ;; esac
    printf '%s\n' "$1" | put_file $etc/machine.json 600
    # Read from an open file: what it holds is secret, and gone from the disk at once.
    exec 3<"$script"
    rm -f "$script"
    if has_systemd; then
        (umask 022; exec /bin/sh -s <&3 3<&- >>$log 2>&1)
        code=$?
        exec 3<&-
        [ $code = 0 ] || fail "first-boot data ended with $code: $(tail -n 3 $log | tr '\n' ' ')"
        return
    fi
    (umask 022; exec setsid /bin/sh -s <&3 3<&- >>$log 2>&1) &
    pid=$!
    exec 3<&-
    echo "$pid $(start_of $pid)" >$pidfile
    for _ in 1 2 3 4 5; do
        sleep 0.1
        runs && continue
        wait $pid
        code=$?
        rm -f $pidfile
        fail "what first-boot data started ended with $code: $(tail -n 3 $log | tr '\n' ' ')"
    done
}

# Ends what first-boot data started, and what runs below it without being told to.
stop() {
    if has_systemd; then
        systemctl disable --now kprov-node.service >/dev/null 2>&1
        rm -f /etc/systemd/system/kprov-node.service
        systemctl daemon-reload
        return 0
    fi
    runs || { rm -f $pidfile; return 0; }
    read -r pid started <$pidfile
    kill -TERM "$pid" 2>/dev/null
    tries=0
    while [ "$(start_of "$pid")" = "$started" ]; do
        tries=$((tries + 1))
        [ $tries = 200 ] && kill -KILL "$pid" 2>/dev/null
        [ $tries = 250 ] && fail "process $pid does not end"
        sleep 0.1
    done
    rm -f $pidfile
}

# CLUSTER: stops and removes all that kprov put here, but for the data disk.
remove() {
    marker=$(line_of $etc/machine.json)
    case $marker in "" | *"\"cluster\":\"$1\""*) ;; *) fail "the host is another cluster's" ;; esac
    stop
    if [ -x $binary ]; then
        said=$($binary reset 2>&1) || fail "kprov-node reset: $(echo "$said" | tail -n 3 | tr '\n' ' ')"
    fi
    if [ -f $etc/before/containerd.toml ]; then
        mkdir -p /etc/containerd
        cp -p $etc/before/containerd.toml /etc/containerd/config.toml
    fi
    if [ -f $etc/before/sysctl ]; then
        while read -r setting value; do
            [ -w "/proc/sys/$setting" ] && echo "$value" >"/proc/sys/$setting" 2>/dev/null
        done <$etc/before/sysctl
    fi
    rm -f $binary $binary.new $log $etc/node.json $etc/node.json.new
    rm -rf $etc/before $etc/before.new
    rm -f $etc/machine.json
    [ -f $etc/disk.json ] || rm -rf $state
    rmdir $etc $state 2>/dev/null
    return 0
}

printed() {
    if has_systemd; then
        text=$(journalctl -q -u kprov-node.service -n 60 -o cat --no-pager 2>/dev/null)
    else
        text=$(tail -n 60 $log 2>/dev/null)
    fi
    printf '%s\n' "$text" | while IFS= read -r line; do say line "$line"; done
}

step=$1
shift
echo KPROV-BEGIN
case $step in
    facts | disks | kind | look | claim | release | has | put | install | stop | remove | printed) "$step" "$@" ;;
    *) fail "there is no step \`$step\`" ;;
esac
echo KPROV-END
