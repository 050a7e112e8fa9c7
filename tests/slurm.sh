#!/usr/bin/env bash
# A real SLURM on this machine alone, without systemd, for the tests: munged, slurmctld, slurmd.
#
#   tests/slurm.sh start FOLDER    then: . FOLDER/env.sh
#   tests/slurm.sh stop FOLDER
#
# FOLDER must be short: unix sockets live in it. Debian: apt-get install slurmctld slurmd slurm-client munge
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd -P)
export SLURM_CONF="$folder/slurm.conf"

fail() {
    echo "slurm.sh: $*" >&2
    tail -n 20 "$folder"/*.log >&2 || true
    exit 1
}

free_port() { # the first free one from $1 on
    local port=$1
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

write_configuration() {
    local host port bind=""
    host=$(hostname -s)
    port=$(free_port 16817)
    # Listening on loopback alone is possible only where the machine's own name means loopback.
    case "$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 {print $1}')" in
    127.*) bind="CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" ;;
    esac
    # cred_expire is also how long a requeued job waits (120 s by default). Job numbers follow the clock: submitit would
    # take an old job's folder for that of a new job with the same number. Processors and memory may be more than there
    # are (config_overrides).
    cat >"$SLURM_CONF" <<CONF
ClusterName=tests
FirstJobId=$(($(date +%s) % 60000000 + 1))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$(free_port $((port + 1)))
$bind
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_min_age_reserve=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
InactiveLimit=0
MinJobAge=86400
ReturnToService=2
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    echo "CgroupPlugin=disabled" >"$folder/cgroup.conf"
    # Before 23.11 SLURM does not know that setting, and needs none.
    slurmctld -V | awk '{split($2, v, "."); exit !(v[1] * 100 + v[2] < 2311)}' && : >"$folder/cgroup.conf" || true
    # Without accounting there is no sacct, which submitit asks for states: the controller knows them as well.
    cat >"$folder/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
    if [ "$1" = -j ]; then
        shift
        scontrol -o show job "$1" 2>/dev/null | sed -nE 's/^JobId=([0-9]+) .* JobState=(\S+) .* NodeList=(\S*) .*/\1|\2|\3/p'
    fi
    shift
done
SACCT
    chmod +x "$folder/bin/sacct"
    printf 'export SLURM_CONF=%s PATH=%s:$PATH\n' "$SLURM_CONF" "$folder/bin" >"$folder/env.sh"
}

start() {
    [ ${#folder} -le 60 ] || fail "$folder is too long a path for a socket"
    mkdir -p "$folder"/{munge,state,spool,bin}
    chmod 711 "$folder/munge"
    write_configuration
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge/seed" </dev/null >/dev/null 2>&1 || fail "no munged"
    slurmctld -c -f "$SLURM_CONF" </dev/null >/dev/null 2>&1 || fail "no slurmctld"
    slurmd -c -N localhost -f "$SLURM_CONF" </dev/null >/dev/null 2>&1 || fail "no slurmd"
    for _ in $(seq 150); do
        if [ "$(timeout 5 sinfo -h -p low -o %T 2>/dev/null)" = idle ] && timeout 10 srun -Q -n1 true 2>/dev/null; then
            return
        fi
        sleep 0.2
    done
    fail "the node does not become idle"
}

stop() {
    # A job that is killed before it is canceled may be requeued.
    timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null || true
    timeout 10 scancel --quiet --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do
        [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
        sleep 0.2
    done
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$folder/$daemon.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

case $action in
start) start ;;
stop) stop ;;
*) fail "start or stop?" ;;
esac
