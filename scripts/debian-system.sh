# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# New Debian systems in folders, made by debootstrap from this machine's own
# archive: what scripts/check-fresh, scripts/deb and scripts/check-deb share.
# Sourced after common.sh. The caller sets TOP, the folder that the systems and
# the file "results" are in, and ROOT, the system that as_root enters.

ENTER_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# as_root COMMAND...: in the system in $ROOT
as_root()
{
    env -i PATH=$ENTER_PATH HOME=/root TERM=dumb \
        DEBIAN_FRONTEND=noninteractive \
        ${http_proxy:+http_proxy="$http_proxy"} chroot "$ROOT" "$@"
}

# need_systems GROUP...: what is needed to make systems, with these groups of
# scripts/packages, and no other script that makes some. From here on what is
# made belongs to the owner of the clone when the script ends, so that he can
# remove it.
need_systems()
{
    [ "$(id -u)" = 0 ] ||
        die "This makes new systems with debootstrap and chroot; run it as root."
    lock_top
    trap give_back EXIT
    scripts/deps "$@"
    debian_entry || die "This machine's package sources name no Debian archive" \
        "that could be reached; there is nothing to make a system from."
    give_back
}

give_back()
{
    local folder

    [ ! -O . ] || return 0
    for folder in "$TOP" cache; do
        [ ! -e "$folder" ] || chown -hR --reference=. "$folder"
    done
}

# need_space MEGABYTES: in the file system of $TOP, which exists
need_space()
{
    local available

    available=$(($(stat -f -c '%a * %S' "$TOP") >> 20))
    [ "$available" -ge "$1" ] || die "$TOP has $available MB of space, and" \
        "this needs $1 MB. Make room there, or clone to another disk."
}

# $TOP must have O_DIRECT
need_direct()
{
    if ! dd if=/dev/zero of="$TOP/direct" bs=4k count=1 oflag=direct \
            2> /dev/null || [ "$(stat -f -c %T "$TOP")" = tmpfs ]; then
        die "$TOP must be on a file system with O_DIRECT, and not on a tmpfs."
    fi
}

# bootstrap SUITE FOLDER LOG: what the machine's archive has of a suite, with its
# security updates if the machine uses those
bootstrap()
{
    local suite=$1 base=$2 release until conf security

    debian_entry Debian-Security || true
    security=$ENTRY_URI
    debian_entry
    say "$suite: debootstrap from $ENTRY_URI"
    run_logged "$3" debootstrap --variant=minbase \
        ${ARCHIVES:+--cache-dir="$ARCHIVES"} \
        --include=ca-certificates --keyring="$ENTRY_KEY" "$suite" "$base" \
        "$ENTRY_URI" || return 1
    conf=$base/etc/apt/apt.conf.d/99seqcache
    echo 'APT::Get::Assume-Yes "true";' > "$conf"
    # The system does not outlive a crash of this machine
    echo force-unsafe-io > "$base/etc/dpkg/dpkg.cfg.d/99seqcache"
    apt-config dump | grep '^Acquire::.*[Pp]roxy' >> "$conf" || true
    release=$(echo "$base"/var/lib/apt/lists/*_InRelease)
    until=$(sed -n 's/^Valid-Until: //p' "$release")
    if [ -n "$until" ] && [ "$(date -d "$until" +%s)" -lt "$(date +%s)" ]; then
        say "$suite: the archive's lists ended on $until; used nevertheless"
        echo 'Acquire::Check-Valid-Until "false";' >> "$conf"
    fi
    if [ "$suite" != sid ] && [ -n "$security" ]; then
        echo "deb $security $suite-security main" \
            >> "$base/etc/apt/sources.list"
    fi
}

# What programs in $ROOT need; the mounts end with the namespace
mount_system()
{
    mount -t proc proc "$ROOT/proc"
    mount --rbind /dev "$ROOT/dev"
    mount -t tmpfs tmpfs "$ROOT/dev/shm"
}

unmount_system()
{
    umount -R "$ROOT/dev" "$ROOT/proc" 2> /dev/null || true
}

remove()
{
    rm -rf --one-file-system "$@"
}

# result TEXT...: one line of the summary
result()
{
    say "$*"
    printf '%s\n' "$*" >> "$TOP/results"
}

# The folder $TOP, for one script at a time
lock_top()
{
    [ -z "${TOP_IS_LOCKED-}" ] || return 0
    # The folder that is there before and after
    exec 7< .
    flock -n 7 || die "Another script makes Debian systems here."
    export TOP_IS_LOCKED=1
}

# in_namespace COMMAND...: with mounts and processes of its own, all of which
# end with this script, however it ends
in_namespace()
{
    local child rc=0

    setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child "$@" &
    child=$!
    # shellcheck disable=SC2064 # the child of now
    trap "interrupted $child" INT TERM
    wait $child || rc=$?
    trap - INT TERM
    return $rc
}

interrupted()
{
    { kill -KILL "$1" && wait; } 2> /dev/null
    say "Interrupted; nothing is mounted, and what was made is in $TOP/"
    exit 130
}
