# Unsets the shell scripts' variables, but for those that are named: what a user has set for another run is not meant.
# Sourced in the repository's folder: source toy/unset_settings.sh DAVIS_ROOT
for variable in $(grep -o 'variable="[A-Z_0-9]*"' libs/training/config.py | cut -d '"' -f 2) \
  ACCELERATE_CONFIG MACHINE_RANK MAIN_ADDRESS MAIN_PORT NUM_MACHINES NUM_PROCESSES SLURM_NODEID; do
  [[ " $* " == *" $variable "* ]] || unset "$variable"
done
