# For cpu.sh and gpu.sh: runs a benchmark in parts, each bounded in time, and remembers which are done.
#
#   --dry-run   print the commands
#   --redo      forget what is done
#   NAME ...    run these parts only

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PACA=${PACA:-paca}
DRY=0
ONLY=()
UNFINISHED=()
SHRINK=${SHRINK:-}

begin() { # the script's name, then its arguments
    DONE=.cache/bench-done/$1
    shift
    for argument in "$@"; do
        case $argument in
            --dry-run) DRY=1 ;;
            --redo) rm -rf "$DONE" ;;
            -*) echo "unknown option $argument; known: --dry-run, --redo, names of parts" >&2; exit 2 ;;
            *) ONLY+=("$argument") ;;
        esac
    done
}

part() { # name, seconds, then the arguments of paca bench
    local name=$1 seconds=$2
    shift 2
    if [ ${#ONLY[@]} -gt 0 ] && [[ " ${ONLY[*]} " != *" $name "* ]]; then return; fi
    if [ $DRY = 1 ]; then echo "timeout $seconds $PACA bench $*"; return; fi
    if [ -e "$DONE/$name" ]; then echo "== $name: done before"; return; fi
    echo "== $name, at most $seconds s: paca bench $*"
    if timeout --kill-after=10 "$seconds" "$PACA" bench "$@"; then
        mkdir -p "$DONE" && touch "$DONE/$name"
    else
        echo "== $name: unfinished (its rows so far are kept)"
        UNFINISHED+=("$name")
    fi
}

finish() {
    if [ ${#UNFINISHED[@]} -gt 0 ]; then
        echo "Unfinished: ${UNFINISHED[*]}. Run the script again: what is done is not repeated."
        exit 1
    fi
}
