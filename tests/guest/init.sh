#!/bin/busybox sh
# The guest's first process: it brings the machine up, then runs the commands that arrive on the second serial port.
# A command arrives as one line "ID BASE64 ID"; the answer is a line "<RS>ID STATUS LENGTH" and LENGTH bytes of output.
# A line that was damaged on its way is ignored, and one that comes again is answered again: whoever gets no answer repeats
# the command, which runs once.
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /dev /proc /sys /run /tmp /mnt /root
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/sbin:/usr/bin:/bin HOME=/root
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
for module in /modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done

root=
for word in $(cat /proc/cmdline); do
    case "$word" in vhostuser.root=*) root=${word#*=} ;; esac
done
if [ -n "$root" ] && [ "$$" = 1 ] && [ ! -e /.switched ]; then
    tries=0
    while [ ! -b "$root" ] && [ "$tries" -lt 200 ]; do usleep 50000; tries=$((tries + 1)); done
    if mount -t ext4 "$root" /mnt; then
        umount /run /tmp /sys /proc
        mount --move /dev /mnt/dev
        exec switch_root /mnt /init
    fi
    echo "vhostuser: $root cannot be mounted as the root file system" >/dev/kmsg
fi

stty -F /dev/ttyS1 raw -echo -onlcr
exec 3<>/dev/ttyS1
printf '\036ready %s\n' "$(cat /proc/sys/kernel/random/boot_id)" >&3
last=
while read -r id encoded again <&3; do
    [ -n "$again" ] && [ "$id" = "$again" ] || continue
    if [ "$id" != "$last" ]; then
        last=$id
        echo "$encoded" | base64 -d >/run/command
        sh -c '. /etc/profile; . /run/command' </dev/null >/run/output 2>&1 3>&-
        status=$?
    fi
    { printf '\036%s %s %s\n' "$id" "$status" "$(stat -c %s /run/output)"; cat /run/output; } >&3
done
echo "vhostuser: the command port is gone" >/dev/kmsg
poweroff -f
