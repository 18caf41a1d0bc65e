# Sourced by up.sh when HPC_NEURO_SLURM_ACCT=1: accounts in a MariaDB of the cluster's own (needs slurmdbd and mariadb).
# Account `lab` with the services `normal` and `long`, and `other` with `normal` and at most 20 jobs, for this user.
mkdir -p "$DIR/mysql"
chown mysql:mysql "$DIR/mysql"
mariadb-install-db --no-defaults --user=mysql --datadir="$DIR/mysql/data" --auth-root-authentication-method=normal \
  --skip-test-db >"$DIR/log/mysql_install"
start mariadbd /usr/sbin/mariadbd --no-defaults --user=mysql --datadir="$DIR/mysql/data" --socket="$DIR/mysql/sock" \
  --skip-networking --pid-file="$DIR/mysql/pid" --innodb-buffer-pool-size=32M --innodb-log-file-size=8M \
  --innodb-lock-wait-timeout=900
wait_for 30 mariadbd mariadb-admin --no-defaults -S "$DIR/mysql/sock" -uroot ping
mariadb --no-defaults -S "$DIR/mysql/sock" -uroot -e "create database slurm_acct_db"
cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 2))
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CommunicationParameters=NoInAddrAny
CONF
chmod 600 "$DIR/slurmdbd.conf"
# libmariadb takes the socket of "localhost" from MYSQL_UNIX_PORT; slurmdbd's conf comes from SLURM_CONF's folder
start slurmdbd env MYSQL_UNIX_PORT="$DIR/mysql/sock" SLURM_CONF="$SLURM_CONF" /usr/sbin/slurmdbd -D
accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 2))
AccountingStoragePass=$DIR/munge/sock
AccountingStorageEnforce=associations,limits,qos
JobAcctGatherType=jobacct_gather/linux"

# after slurm.conf is written, before slurmctld starts
add_accounts() {
  wait_for 30 slurmdbd sacctmgr -n -i list cluster
  {
    sacctmgr -Q -i add cluster hpc_neuro
    sacctmgr -Q -i add qos long
    sacctmgr -Q -i add account lab,other Description=development Organization=development
    sacctmgr -Q -i add user root Account=lab DefaultAccount=lab QOS=normal,long
    sacctmgr -Q -i add user root Account=other QOS=normal MaxSubmitJobs=20
  } >/dev/null
}
