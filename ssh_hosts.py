"""What the settings and the SSH config together say of a host: whom to log in as, how it is reached, what it must show.

A variable that is set wins over the SSH config, except that SSH_DEFAULT_USER and SSH_DEFAULT_PORT win for the default
host alone; for other hosts they stand where the config says nothing. `StrictHostKeyChecking no`, `off` and `ask` mean
strict here: nobody is there to be asked, and an unverified host is nobody.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings import Settings, SettingsError, Target
from ssh_config import HostConfig, SshConfig
from ssh_config_values import Hop
from ssh_errors import ConfigError
from ssh_known_hosts import KnownAs, KnownHosts


@dataclass(frozen=True)
class Host:
    """All that is needed to reach a target, and to know it."""

    target: Target
    config: HostConfig
    is_default: bool
    known_hosts: KnownHosts
    accepts_new: bool
    connect_seconds: float

    @property
    def known_as(self) -> KnownAs:
        """What it is called in known_hosts."""
        return KnownAs(self.config.hostname, self.target.port, self.config.host_key_alias)

    def __str__(self) -> str:
        """The target as it was named, and the host that it leads to where that is another one."""
        if self.config.hostname == self.target.host:
            return str(self.target)
        return f"{self.target} ({self.config.hostname})"


class Hosts:
    """The hosts of one configuration. Thread-safe; the SSH config is read at every question."""

    def __init__(self, settings: Settings, known_hosts: Callable[..., KnownHosts] = KnownHosts) -> None:
        """`known_hosts` makes what their keys are known by."""
        path = settings.ssh_config
        self._settings = settings
        self._known_hosts = known_hosts
        self._config = SshConfig(
            None if str(path) in ("none", os.devnull) else path,
            may_be_missing="ssh_config" not in settings.model_fields_set,
            exec_seconds=settings.ssh_connect_timeout,
        )

    def check(self) -> None:
        """Raise SettingsError when the SSH config cannot be read."""
        try:
            self._config.check()
        except ConfigError as error:
            raise SettingsError(str(error)) from None

    def aliases(self) -> list[str]:
        """Return the names that the SSH config gives to hosts. Raises ConfigError. Nothing is reached or run."""
        return self._config.aliases()

    def target(self, host: str, user: str | None = None, port: int | None = None) -> Target:
        """Return the target that is meant by a host, which is checked already, and what is said with it.

        Raises ConfigError. Nothing is reached, but commands of `Match exec` may run.
        """
        if host == self._settings.ssh_default_host:
            user = user or self._set("ssh_default_user")
            port = port or self._set("ssh_default_port")
        if user and port:
            return Target(user, host, port)
        found = self._look_up(host, user, port)
        return Target(found.user, host, found.port)

    def host(self, target: Target) -> Host:
        """Return how a target is reached: as by `ssh -l user -p port host`. Raises ConfigError."""
        default = self._settings.ssh_default_host
        is_default = target.host == default and target == self.target(target.host)
        return self._host(target, self._look_up(target.host, target.user, target.port), is_default)

    def jump_host(self, hop: Hop) -> Host:
        """Return how a jump host is reached; what the config does not say is as for `ssh`. Raises ConfigError."""
        config = self._config.lookup(hop.host, hop.user, hop.port)
        return self._host(Target(config.user, hop.host, config.port), config, is_default=False)

    def _look_up(self, host: str, user: str | None, port: int | None) -> HostConfig:
        settings = self._settings
        return self._config.lookup(
            host, user, port, default_user=settings.ssh_default_user, default_port=settings.ssh_default_port
        )

    def _host(self, target: Target, config: HostConfig, is_default: bool) -> Host:
        files = self._known_hosts_files(config)
        policy = self._set("ssh_host_key_policy") or config.strict_host_key_checking
        return Host(
            target=target,
            config=config,
            is_default=is_default,
            known_hosts=self._known_hosts(*files, hash_names=config.hash_known_hosts),
            # what is recorded nowhere would be new every time
            accepts_new=policy == "accept-new" and files[0] != Path(os.devnull),
            connect_seconds=self._set("ssh_connect_timeout")
            or config.connect_timeout
            or self._settings.ssh_connect_timeout,
        )

    def _known_hosts_files(self, config: HostConfig) -> list[Path]:
        if "ssh_known_hosts" in self._settings.model_fields_set:
            return [self._settings.ssh_known_hosts]
        of_user = config.user_known_hosts
        files = [self._settings.ssh_known_hosts] if of_user is None else [Path(name) for name in of_user]
        return [*(files or [Path(os.devnull)]), *map(Path, config.global_known_hosts or ())]

    def _set(self, name: str) -> Any:
        """Return what the operator set a variable to, or None."""
        return getattr(self._settings, name) if name in self._settings.model_fields_set else None
