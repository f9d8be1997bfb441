# To be sourced by bash, from anywhere:  . scripts/env.sh
# Makes this clone's ROS 2, Python environment and build the ones that the shell uses: PATH, PYTHONPATH, library and
# ament paths, the DDS profile, discovery on this machine only. Sourcing it twice changes nothing more. NERVE_DISTRO says
# which ROS 2, as for scripts/setup.
# shellcheck shell=bash

_nerve_prepend() { # _nerve_prepend VARIABLE ENTRY: to the front, once
  local entries=:${!1:-}:
  entries=${entries//:"$2":/:}
  entries=${entries#:}
  entries=${entries%:}
  export "$1=$2${entries:+:$entries}"
}

_nerve_leave_out() { # _nerve_leave_out VARIABLE PREFIX: every entry that lies in the folder PREFIX
  local entry kept=
  local -a entries
  IFS=: read -r -a entries <<<"${!1:-}"
  for entry in "${entries[@]}"; do
    [[ $entry == "$2" || $entry == "$2"/* ]] || kept+=${kept:+:}$entry
  done
  if [[ -n $kept ]]; then export "$1=$kept"; else unset "$1"; fi
}

_nerve_env() {
  local root home venv prefix variable folder distro=${NERVE_DISTRO:-kilted}
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
  home=$root
  [[ $distro == kilted ]] || home=$root/.$distro
  venv=$home/.venv
  if [[ ! -e $venv/.nerve-setup || ! -e $home/install/setup.bash ]]; then
    printf 'scripts/env.sh: no ROS 2 %s is built here yet. Run first:  NERVE_DISTRO=%s %s/scripts/setup\n' \
      "${distro^}" "$distro" "$root" >&2
    return 1
  fi

  # Two ROS 2 in one process do not work: what another one has put on the paths of this shell is taken off. So is what
  # this file has put there before, which makes the order the same each time.
  local -a prefixes
  IFS=: read -r -a prefixes <<<"$root:${AMENT_PREFIX_PATH:-}:${COLCON_PREFIX_PATH:-}"
  for prefix in "${prefixes[@]}"; do
    [[ -n $prefix ]] || continue
    if [[ $prefix != "$root" && $prefix != "$root"/* && :${AMENT_PREFIX_PATH:-}: == *:"$prefix":* ]]; then
      printf 'scripts/env.sh: leaving out %s (this shell had it sourced)\n' "$prefix" >&2
    fi
    for variable in PATH PYTHONPATH LD_LIBRARY_PATH AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH PKG_CONFIG_PATH; do
      _nerve_leave_out "$variable" "$prefix"
    done
  done

  export VIRTUAL_ENV=$venv
  unset PYTHONHOME
  _nerve_prepend PATH "$venv/bin"
  _nerve_prepend AMENT_PREFIX_PATH "$venv"
  _nerve_prepend CMAKE_PREFIX_PATH "$venv"
  for folder in "$venv"/lib/python3*/site-packages/ros_*.libs "$venv/lib"; do
    _nerve_prepend LD_LIBRARY_PATH "$folder"
  done
  # Each Python of the wheels starts itself once more to set the library path, in no fixed order, unless this variable says that it is set.
  export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1
  export ROS_VERSION=2 ROS_PYTHON_VERSION=3 ROS_DISTRO=$distro
  if [[ -n ${RMW_IMPLEMENTATION:-} && ! -e $venv/lib/lib$RMW_IMPLEMENTATION.so ]]; then
    printf 'scripts/env.sh: RMW_IMPLEMENTATION=%s is not in this environment; using rmw_fastrtps_cpp\n' "$RMW_IMPLEMENTATION" >&2
    export RMW_IMPLEMENTATION=rmw_fastrtps_cpp
  fi

  local nounset=false
  if [[ $- == *u* ]]; then nounset=true; fi
  set +u
  # shellcheck disable=SC1091
  . "$home/install/setup.bash"
  if [[ $nounset == true ]]; then set -u; fi

  # Fast DDS's own shared memory segment of 512 kB loses every image of a megabyte. Jazzy knows the profile file by an older
  # name, which later distributions warn about.
  local profile=$root/config/fastdds.xml
  if [[ ${FASTDDS_DEFAULT_PROFILES_FILE:-${FASTRTPS_DEFAULT_PROFILES_FILE:-$profile}} == "$profile" ]]; then
    export FASTDDS_DEFAULT_PROFILES_FILE=$profile
    if [[ $distro == jazzy ]]; then
      export FASTRTPS_DEFAULT_PROFILES_FILE=$profile
    else
      unset FASTRTPS_DEFAULT_PROFILES_FILE
    fi
  fi
  export ROS_AUTOMATIC_DISCOVERY_RANGE=${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}
  export ROS_LOG_DIR=${ROS_LOG_DIR:-$home/log/ros}
}

if _nerve_env; then
  unset -f _nerve_env _nerve_prepend _nerve_leave_out
else
  unset -f _nerve_env _nerve_prepend _nerve_leave_out
  return 1
fi
