"""Completion files for bash and zsh, made from the table of options: etc/completion/. No relay needs this module.

Both complete the words for the command, long options with a blank or = before the value, and values where they can be
known: words, files, accounts, interfaces. A value may look like a command ("--user demo"), and is none.
"""

import re
import textwrap

from tproxy_relay.config import option_addresses, option_types
from tproxy_relay.config.options import ACTION, COMMAND, OPTIONS, POSITIONAL, Option

_MADE = """\
# Completion of tproxy-relay for {name}, made by "python -m tproxy_relay.config.reference {name}".
# Change tproxy_relay/config/options.py or tproxy_relay/config/completion.py instead of this file.
"""

# = and : divide words (COMP_WORDBREAKS): --mode=redirect is three of them.
_BASH = """\
_tproxy_relay() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command='' action='' option='' i

    # Each word before this one: the command, its action, an option, or the value of one.
    for ((i = 1; i < COMP_CWORD; i++)); do
        option=
        case ${{COMP_WORDS[i]}} in
            {words})
                if [[ -z $command ]]; then command=${{COMP_WORDS[i]}}; else action=${{COMP_WORDS[i]}}; fi
                ;;
            -*)
                option=${{COMP_WORDS[i]#-}} option=${{option#-}}
                case $option in
                    {with_value}) ;;
                    *) option= ;;
                esac
                if [[ -n $option ]] && ((i + 1 < COMP_CWORD)); then
                    [[ ${{COMP_WORDS[i + 1]}} != '=' ]] || ((i++))
                    ((i++))
                    ((i == COMP_CWORD)) || option=
                fi
                ;;
        esac
    done
    [[ -z $option || $word != '=' ]] || word=

    COMPREPLY=()
    case $option in
{values}
        ?*) return ;;
        *)
            if [[ -z $command && $word != -* ]]; then
                _tproxy_relay_words {command_words}
            elif [[ $command == rules && -z $action && $word != -* ]]; then
                _tproxy_relay_words {action_words}
            else
                _tproxy_relay_words {options}
            fi
            ;;
    esac
}}

# Those of the arguments that the word begins.
_tproxy_relay_words() {{
    mapfile -t COMPREPLY < <(compgen -W "$*" -- "$word")
}}

complete -F _tproxy_relay tproxy-relay
"""

_ZSH = """\
#compdef tproxy-relay
{made}
local curcontext=$curcontext state line ret=1
local -a actions=(
{actions}
)
typeset -A opt_args

_arguments -C \\
{options} \\
  '1:command:(({commands}))' \\
  '2: :->action' && ret=0

if [[ $state == action && $line[1] == rules ]]; then
  _describe action actions && ret=0
fi
return ret
"""


def bash() -> str:
    """The text of the completion file for bash: a function, and that it completes tproxy-relay."""
    options = [option for option in OPTIONS.values() if option not in POSITIONAL]
    return _MADE.format(name="bash") + _BASH.format(
        words=_wrapped(" | ".join(dict.fromkeys(COMMAND.words + ACTION.words)), 12),
        with_value=_wrapped(" | ".join(option.name for option in options if option.kind), 20),
        values="\n".join(
            f"        {option.name}) {_bash_value(option)} ;;" for option in options if _bash_value(option)
        ),
        options=_wrapped(" ".join(f"--{option.name}" for option in options), 20),
        action_words=" ".join(ACTION.words),
        command_words=" ".join(COMMAND.words),
    )


def _wrapped(words: str, indent: int) -> str:
    """On lines of their own where it gets long, the further ones indented."""
    return f" \\\n{' ' * indent}".join(textwrap.wrap(words, 90, break_on_hyphens=False))


def _bash_value(option: Option) -> str:
    """What completes its value; '' if nothing can."""
    if option.words:
        return f"_tproxy_relay_words {' '.join(option.words)}"
    if option.kind in (option_types.PATH, option_types.FOLDER):
        return f"compopt -o {'default' if option.kind is option_types.PATH else 'dirnames'}"
    if option.kind is option_types.ACCOUNT:
        return 'mapfile -t COMPREPLY < <(compgen -u -- "$word")'
    if option.kind is option_addresses.INTERFACE:
        return '_tproxy_relay_words "$(ls /sys/class/net)"'
    return ""


def zsh() -> str:
    """The text of the completion file for zsh, to be autoloaded as _tproxy-relay."""
    options = [_zsh_option(option) for option in OPTIONS.values() if option not in POSITIONAL]
    return _ZSH.format(
        made=_MADE.format(name="zsh"),
        actions="\n".join(f"  {_quoted(f'{word}:{_short(text)}')}" for word, text in ACTION.explained.items()),
        options=" \\\n".join(f"  {option}" for option in options),
        commands=_zsh_words(COMMAND),
    )


def _zsh_option(option: Option) -> str:
    text = re.sub(r"([][:\\])", r"\\\1", _short(option.meaning))
    if option.name == "help":
        return f"'(- *)'{{-h,--help}}{_quoted(f'[{text}]')}"
    if option.name == "version":
        return _quoted(f"(- *)--version[{text}]")
    if not option.kind:
        return _quoted(f"--{option.name}[{text}]")
    metavar = option.metavar.replace(":", r"\:")
    return _quoted(f"--{option.name}=[{text}]:{metavar}:{_zsh_value(option)}")


def _zsh_value(option: Option) -> str:
    if option.words:
        return f"(({_zsh_words(option)}))"
    if option.kind in (option_types.PATH, option_types.FOLDER):
        return "_files" if option.kind is option_types.PATH else "_files -/"
    if option.kind is option_types.ACCOUNT:
        return "_users"
    if option.kind is option_addresses.INTERFACE:
        return "_net_interfaces"
    return " "


def _zsh_words(option: Option) -> str:
    """Its words, each with what it means where the table says so."""
    meanings = option.explained
    return " ".join(
        rf'{word}\:"{_in_double_quotes(meanings[word])}"' if word in meanings else word for word in option.words
    )


def _in_double_quotes(text: str) -> str:
    return re.sub(r'(["$`:\\])', r"\\\1", _short(text))


def _short(text: str) -> str:
    """Its beginning: what stands before the first full stop or semicolon."""
    return re.split(r"[.;] ", text)[0].removesuffix(".")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"'\''") + "'"
