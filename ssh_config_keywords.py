"""The keywords of ssh_config(5) that are not acted upon: which are passed over, and why, and which are refused.

None is skipped in silence. A keyword that decides whom one reaches, or how either side proves who it is, and that is
not built, stops the connection unless it says what happens anyway.
"""

from collections.abc import Mapping

ALIASES: Mapping[str, str] = {
    "identityfile2": "identityfile",
    "dsaauthentication": "pubkeyauthentication",
    "pubkeyacceptedkeytypes": "pubkeyacceptedalgorithms",
    "smartcarddevice": "pkcs11provider",
}
"""Older names, which OpenSSH still takes."""

_PASSED_OVER_BECAUSE: Mapping[str, str] = {
    "a call has no terminal and says itself what is run": (
        "batchmode enableescapecommandline escapechar forkafterauthentication localcommand numberofpasswordprompts "
        "obscurekeystroketiming permitlocalcommand remotecommand requesttty sessiontype stdinnull visualhostkey"
    ),
    "nothing is forwarded": (
        "clearallforwardings dynamicforward exitonforwardfailure forwardagent forwardx11 forwardx11timeout "
        "forwardx11trusted gatewayports localforward permitremoteopen remoteforward streamlocalbindmask "
        "streamlocalbindunlink tunnel tunneldevice xauthlocation"
    ),
    "the environment of a command is that of the call": "sendenv setenv",
    "connections are kept, shared, tried and watched by the server's own settings": (
        "channeltimeout connectionattempts controlmaster controlpath controlpersist keepalive serveralivecountmax "
        "tcpkeepalive"
    ),
    "the wire is tuned by the server itself": "compression compressionlevel ipqos rekeylimit",
    "the server has its own log": "fingerprinthash loglevel logverbose syslogfacility versionaddendum warnweakcrypto",
    "only keys are shown at a login; other ways are not tried, allowed or not": (
        "challengeresponseauthentication enablesshkeysign gssapiauthentication gssapiclientidentity "
        "gssapidelegatecredentials gssapikexalgorithms gssapikeyexchange gssapirenewalforcesrekey "
        "gssapiserveridentity gssapitrustdns hostbasedacceptedalgorithms hostbasedauthentication hostbasedkeytypes "
        "kbdinteractiveauthentication kbdinteractivedevices passwordauthentication skeyauthentication "
        "tisauthentication"
    ),
    "keys are never given to an agent, and FIDO keys not used": "addkeystoagent securitykeyprovider",
    "host keys are checked by known_hosts alone, which is stricter": (
        "nohostauthenticationforlocalhost updatehostkeys verifyhostkeydns"
    ),
    "without CanonicalizeHostname it does nothing": (
        "canonicaldomains canonicalizefallbacklocal canonicalizemaxdots"
    ),
    "it only names a tag, and Match tagged is refused": "tag",
    "OpenSSH itself does nothing with it any more": (
        "afstokenpassing cipher fallbacktorsh globalknownhostsfile2 kerberosauthentication kerberostgtpassing "
        "protocol rhostsauthentication rhostsrsaauthentication rsaauthentication useprivilegedport "
        "userknownhostsfile2 useroaming usersh"
    ),
}

PASSED_OVER: Mapping[str, str] = {
    keyword: reason for reason, keywords in _PASSED_OVER_BECAUSE.items() for keyword in keywords.split()
}
"""Keywords that cannot matter here, and why. Their arguments are not looked at."""

REFUSED: Mapping[str, frozenset[str]] = {
    "bindaddress": frozenset(),
    "bindinterface": frozenset(),
    "canonicalizehostname": frozenset({"no", "false"}),
    "canonicalizepermittedcnames": frozenset({"none"}),
    "casignaturealgorithms": frozenset({"+", "^"}),
    "checkhostip": frozenset({"no", "false"}),
    "knownhostscommand": frozenset({"none"}),
    "pkcs11provider": frozenset({"none"}),
    "preferredauthentications": frozenset({"publickey"}),
    "proxyusefdpass": frozenset({"no", "false"}),
    "pubkeyacceptedalgorithms": frozenset({"+", "^"}),
    "pubkeyauthentication": frozenset({"yes", "true", "unbound", "host-bound"}),
    "refuseconnection": frozenset(),
    "requiredrsasize": frozenset({"1024"}),
    "revokedhostkeys": frozenset({"none"}),
}
"""Keywords that matter and are not built, with the values that change nothing.

`+` and `^` stand for all lists that begin so, since they forbid nothing; `publickey` for every list that holds it.
"""


def is_harmless(keyword: str, words: tuple[str, ...]) -> bool:
    """Whether a refused keyword says what happens anyway."""
    harmless = REFUSED[keyword]
    if len(words) != 1:
        return False
    values = words[0].lower().split(",")
    return not harmless.isdisjoint({*values, words[0][:1]})
