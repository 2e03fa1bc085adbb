# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What the scripts share. Sourced with the repository's root as the current
# folder; the variables are those that the Makefile exports.

JOBS=${JOBS:-$(nproc)}
V=${V:-0}
# The environment of the tests, see scripts/build; none for the default one
WITH=${WITH-}
export PYTHON=${PYTHON:-/usr/bin/python3}

# mke2fs and others are there, and an ordinary user's PATH may not be
export PATH=$PATH:/usr/sbin:/sbin

# Where apt's lists and logs go
STATE=$PWD/cache
APT_LOG=$STATE/apt.log

# Everything is looked at before anything is downloaded or built: what the
# Makefile takes for all targets here, what only some use in scripts/arguments.

# refuse NAME EXPECTED: the variable's value is not accepted
refuse()
{
    printf '%s=%s: expected %s\n' "$1" "${!1}" "$2" >&2
    exit 1
}

# Whether the folder can be used to build in: it is new, empty, or was built in
is_build_folder()
{
    [ ! -e "$1" ] || [ -z "$(ls -A "$1")" ] || [ -e "$1/make.log" ] ||
        [ -e "$1/build.ninja" ]
}

check_variables()
{
    local more word

    [[ $JOBS =~ ^[1-9][0-9]{0,3}$ ]] || refuse JOBS "a number from 1 to 9999"
    [[ $V == [01] ]] || refuse V "0, or 1 to show the whole output"
    [[ $PWD != *[[:space:]:]* ]] ||
        die "QEMU cannot be built in $PWD: its path has a space or a colon."
    [[ $BUILD != *[[:space:]:]* ]] ||
        refuse BUILD "a folder without spaces and colons in its name"
    is_build_folder "$BUILD" ||
        refuse BUILD "a new folder, or one that was built in before"
    if [ "$PYTHON" != /usr/bin/python3 ] &&
            ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
                2> /dev/null; then
        refuse PYTHON "Python 3.9 or newer"
    fi
    # CONFIGURE_FLAGS is a list of words as on a command line
    (eval "more=(${CONFIGURE_FLAGS-})") 2> /dev/null ||
        refuse CONFIGURE_FLAGS "words as on a command line; see the quotes"
    eval "more=(${CONFIGURE_FLAGS-})"
    for word in ${more[@]+"${more[@]}"}; do
        [[ $word == -* ]] || refuse CONFIGURE_FLAGS \
            "options of QEMU's configure, which begin with --; not $word"
        [ "$word" != --disable-tools ] || refuse CONFIGURE_FLAGS \
            "no --disable-tools: qemu-img is one of them"
    done
}

# as_owner COMMAND...: as the owner of this clone, so that "sudo make" leaves
# nothing of root's in it
as_owner()
{
    local owner

    owner=$(stat -c %U .)
    if [ "$(id -u)" != 0 ] || [ "$owner" = root ]; then
        "$@"
    else
        runuser -u "$owner" -- \
            env HOME="$(getent passwd "$owner" | cut -d: -f6)" "$@"
    fi
}

say()
{
    printf '%s\n' "$*"
}

# The version of QEMU in a folder, .dsc or tarball, or nothing
version_of()
{
    if [ -d "$1" ]; then
        cat "$1/VERSION" 2> /dev/null || true
    elif [[ $1 == *.dsc ]]; then
        sed -n 's/^Version: \([0-9]*:\)\?\([0-9.]*\).*/\2/p' "$1" 2> /dev/null ||
            true
    elif [[ ${1##*/} =~ ^qemu[-_]([0-9]+(\.[0-9]+)+) ]]; then
        printf '%s\n' "${BASH_REMATCH[1]}"
    else
        tar -xOf "$1" --wildcards --no-wildcards-match-slash '*/VERSION' \
            2> /dev/null || true
    fi
}

# 10.0 of 10.0.13
series_of()
{
    expr "$1" : '\([0-9]*\.[0-9]*\)' || true
}

is_version()
{
    [[ " ${KNOWN_VERSIONS[*]} " == *" $1 "* ]]
}

# Which version of QEMU, as patches/versions has it: VERSION says it, else the
# source that QEMU_SRC names, else it is the first one, whatever was built before.
# The names of its folders end in SUFFIX. What is wrong with QEMU_SRC is for
# scripts/prepare to say.
choose_version()
{
    mapfile -t KNOWN_VERSIONS < <(scripts/series --versions)
    if [ -n "${VERSION-}" ]; then
        is_version "$VERSION" || refuse VERSION "one of: ${KNOWN_VERSIONS[*]}"
    elif [ -n "${QEMU_SRC-}" ]; then
        VERSION=$(series_of "$(version_of "$QEMU_SRC")")
    fi
    is_version "${VERSION-}" || VERSION=${KNOWN_VERSIONS[0]}
    export VERSION
    SUFFIX=
    [ "$VERSION" = "${KNOWN_VERSIONS[0]}" ] || SUFFIX=-$VERSION
    BUILD=${BUILD:-build${WITH:+-$WITH}$SUFFIX}
}

# The words of one sentence, or of several; a line break is the caller's
die()
{
    printf '%s\n' "$*" >&2
    exit 1
}

# run_logged LOG COMMAND...: append the command's output to LOG, or show it
# as well with V=1. On failure show the end of the log and return non-zero.
run_logged()
{
    local log=$1 rc=0
    shift

    mkdir -p "$(dirname "$log")"
    printf '+ %s\n' "$*" >> "$log"
    if [ "$V" != 0 ]; then
        "$@" 2>&1 < /dev/null | tee -a "$log" || rc=$?
    else
        "$@" >> "$log" 2>&1 < /dev/null || rc=$?
        if [ "$rc" != 0 ]; then
            printf 'The end of %s:\n' "$log" >&2
            tail -n 40 "$log" >&2
        fi
    fi
    return "$rc"
}

# Only one script at a time may change the prepared tree and the build folders.
# The scripts that it calls share the lock.
take_lock()
{
    [ -z "${SEQCACHE_LOCKED-}" ] || return 0
    export SEQCACHE_LOCKED=1
    mkdir -p cache
    exec 9> cache/lock
    if ! flock -n 9; then
        say "Waiting for another build in this folder"
        flock 9
    fi
}

# The Debian archive that this machine itself uses, as ENTRY_URI and ENTRY_KEY.
# The address and the keyring are the machine's own; none is written here.
#
# debian_entry [LABEL]: LABEL is that of the archive, by default Debian's main
# one, or Debian-Security. Fails if the machine does not use it.
debian_entry()
{
    local lists=$STATE/apt/system-lists label=${1:-Debian} line
    # shellcheck disable=SC2016 # apt expands them
    local -a format=(
        indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)|$(SOURCESENTRY)'
        'Created-By: Packages'
    )

    ENTRY_URI=
    ENTRY_KEY=
    command -v apt-get > /dev/null || return 1
    line=$(apt-get "${format[@]}" | grep -m1 "^Debian|$label|" || true)
    if [ -z "$line" ] && [ "$label" = Debian ]; then
        # The machine's lists were never downloaded
        mkdir -p "$lists/partial"
        run_logged "$APT_LOG" apt-get -o Dir::State::Lists="$lists" \
            -o APT::Sandbox::User= -o APT::Update::Error-Mode=any update ||
            return 1
    fi
    if [ -z "$line" ] && [ -d "$lists" ]; then
        line=$(apt-get -o Dir::State::Lists="$lists" "${format[@]}" |
               grep -m1 "^Debian|$label|" || true)
    fi
    [ -n "$line" ] || return 1
    ENTRY_URI=$(printf '%s\n' "$line" | cut -d'|' -f3)
    line=$(printf '%s\n' "$line" | cut -d'|' -f4)
    ENTRY_KEY=$(sed -nE \
        -e 's/^[Ss]igned-[Bb]y:[[:space:]]*(\/[^[:space:]]+).*/\1/p' \
        -e 's/^deb .*\[.*signed-by=(\/[^] ]+).*\].*/\1/p' \
        "${line%:*}" 2> /dev/null | head -n 1)
    if [ -z "$ENTRY_KEY" ]; then
        ENTRY_KEY=/usr/share/keyrings/debian-archive-keyring.gpg
    fi
}

# private_apt NAME SUITE TYPE [LABEL]: an apt configuration of our own for one
# suite of that archive. Sets APT_OPTIONS for apt-get and apt-cache, and
# downloads the suite's lists; neither the system's lists nor its configuration
# change.
private_apt()
{
    local name=$1 suite=$2 type=$3 top=$STATE/apt

    debian_entry "${4-}" || return 1
    mkdir -p "$top/$name.sources.d" "$top/$name.lists/partial" \
        "$top/archives/partial"
    cat > "$top/$name.sources.d/$name.sources" <<EOF
Types: $type
URIs: $ENTRY_URI
Suites: $suite
Components: main
Signed-By: $ENTRY_KEY
EOF
    APT_OPTIONS=(
        -o Dir::Etc::SourceList=/dev/null
        -o Dir::Etc::SourceParts="$top/$name.sources.d"
        -o Dir::State::Lists="$top/$name.lists"
        -o Dir::Cache::Archives="$top/archives"
        -o APT::Sandbox::User=
        -o DPkg::Lock::Timeout=300
    )
    run_logged "$APT_LOG" apt-get "${APT_OPTIONS[@]}" \
        -o APT::Update::Error-Mode=any update
}

choose_version
check_variables
