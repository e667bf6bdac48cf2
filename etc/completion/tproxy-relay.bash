# Completion of tproxy-relay for bash, made by "python -m tproxy_relay.config.reference bash".
# Change tproxy_relay/config/options.py or tproxy_relay/config/completion.py instead of this file.
_tproxy_relay() {
    local word=${COMP_WORDS[COMP_CWORD]} command='' action='' option='' i

    # Each word before this one: the command, its action, an option, or the value of one.
    for ((i = 1; i < COMP_CWORD; i++)); do
        option=
        case ${COMP_WORDS[i]} in
            run | status | sessions | top | check | rules | install | uninstall | demo | show | apply \
            | remove)
                if [[ -z $command ]]; then command=${COMP_WORDS[i]}; else action=${COMP_WORDS[i]}; fi
                ;;
            -*)
                option=${COMP_WORDS[i]#-} option=${option#-}
                case $option in
                    ports | bind | interface | mode | intercept-inbound | intercept-outbound | inbound-port | \
                    outbound-port | backend | on-failure | mark-mask | route-table | route-priority | workers \
                    | cpu-affinity | user | stall-timeout | self-probe | preserve-source | target | allow | \
                    deny | client-congestion | upstream-congestion | client-pacing | upstream-pacing | \
                    socket-buffer | max-connections | max-per-source | max-rate-per-source | when-full | \
                    connect-timeout | idle-timeout | half-close-timeout | drain-timeout | keepalive | \
                    user-timeout | log-level | log-format | log-file | admin | config | root | show | abort) ;;
                    *) option= ;;
                esac
                if [[ -n $option ]] && ((i + 1 < COMP_CWORD)); then
                    [[ ${COMP_WORDS[i + 1]} != '=' ]] || ((i++))
                    ((i++))
                    ((i == COMP_CWORD)) || option=
                fi
                ;;
        esac
    done
    [[ -z $option || $word != '=' ]] || word=

    COMPREPLY=()
    case $option in
        interface) _tproxy_relay_words "$(ls /sys/class/net)" ;;
        mode) _tproxy_relay_words tproxy redirect ;;
        backend) _tproxy_relay_words auto nft iptables iptables-nft iptables-legacy ;;
        on-failure) _tproxy_relay_words open closed ;;
        workers) _tproxy_relay_words auto ;;
        cpu-affinity) _tproxy_relay_words auto on off ;;
        user) mapfile -t COMPREPLY < <(compgen -u -- "$word") ;;
        preserve-source) _tproxy_relay_words no address full ;;
        max-connections) _tproxy_relay_words auto ;;
        when-full) _tproxy_relay_words wait refuse evict ;;
        log-level) _tproxy_relay_words debug info warning error ;;
        log-format) _tproxy_relay_words console json ;;
        log-file) compopt -o default ;;
        config) compopt -o default ;;
        root) compopt -o dirnames ;;
        ?*) return ;;
        *)
            if [[ -z $command && $word != -* ]]; then
                _tproxy_relay_words run status sessions top check rules install uninstall demo
            elif [[ $command == rules && -z $action && $word != -* ]]; then
                _tproxy_relay_words show apply remove status
            else
                _tproxy_relay_words --ports --bind --interface --mode --intercept-inbound --intercept-outbound --inbound-port \
                    --outbound-port --backend --on-failure --mark-mask --route-table --route-priority \
                    --workers --cpu-affinity --user --stall-timeout --self-probe --preserve-source --target \
                    --allow --deny --client-congestion --upstream-congestion --client-pacing --upstream-pacing \
                    --socket-buffer --max-connections --max-per-source --max-rate-per-source --when-full \
                    --connect-timeout --idle-timeout --half-close-timeout --drain-timeout --keepalive \
                    --user-timeout --log-level --log-format --log-file --admin --config --print-config \
                    --take-over --root --keep --show --abort --json --version --help
            fi
            ;;
    esac
}

# Those of the arguments that the word begins.
_tproxy_relay_words() {
    mapfile -t COMPREPLY < <(compgen -W "$*" -- "$word")
}

complete -F _tproxy_relay tproxy-relay
