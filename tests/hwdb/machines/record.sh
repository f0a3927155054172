#!/bin/sh
# Prints what hwdb reads of a Linux machine, in the form tests/replay.py reads:
#   sh record.sh > my-machine.txt
echo "machine $(uname -m)"
echo "== proc/cpuinfo"; cat /proc/cpuinfo
echo "== proc/self/cgroup"; cat /proc/self/cgroup
[ -e /proc/device-tree/model ] && { echo "== proc/device-tree/model"; tr -d '\000' </proc/device-tree/model; echo; }
for file in $(ls -d /proc/driver/nvidia/version /proc/driver/nvidia/gpus/*/information /sys/module/amdgpu/version \
    /sys/class/kfd/kfd/topology/nodes/*/properties /sys/class/kfd/kfd/topology/nodes/*/mem_banks/*/properties \
    /sys/class/drm/card[0-9]*/device/uevent 2>/dev/null)
do
    echo "== ${file#/}"; grep -v -e UUID -e unique_id -e hive_id "$file"
done
command -v nvidia-smi >/dev/null && { echo "== nvidia-smi"; nvidia-smi \
    --query-gpu=pci.bus_id,name,memory.total,compute_cap,power.limit,clocks.max.sm --format=csv,noheader,nounits; }
echo "== files"
cd / && grep -r . sys/devices/system/cpu/cpu[0-9]*/cache/index*/type \
    sys/devices/system/cpu/cpu[0-9]*/cache/index*/level sys/devices/system/cpu/cpu[0-9]*/cache/index*/size \
    sys/devices/system/cpu/cpu[0-9]*/cache/index*/ways_of_associativity \
    sys/devices/system/cpu/cpu[0-9]*/cache/index*/coherency_line_size \
    sys/devices/system/cpu/cpu[0-9]*/cache/index*/shared_cpu_list \
    sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list sys/devices/system/cpu/cpu[0-9]*/cpu_capacity \
    sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq sys/devices/cpu_atom/cpus \
    sys/class/drm/card[0-9]*/device/vendor sys/class/drm/card[0-9]*/device/mem_info_vram_total 2>/dev/null
grep -H . $(find sys/fs/cgroup -maxdepth 4 \( -name cpu.max -o -name cpu.cfs_quota_us -o -name cpu.cfs_period_us \) 2>/dev/null) /dev/null 2>/dev/null
true
