"""The logins that a configuration asks for, in the order in which they are tried (docs/registries.md)."""

from snapshotter.config import Limits, Registry
from snapshotter.credentials import kubeconfig, providers
from snapshotter.credentials.dockerconfig import DockerConfig
from snapshotter.credentials.executable import Executables
from snapshotter.credentials.kubesecrets import KubernetesSecrets
from snapshotter.credentials.login import AllLogins, Logins
from snapshotter.credentials.remembered import RememberedLogins


def logins(config: Registry, limits: Limits, remembered: RememberedLogins | None = None) -> Logins:
    """`remembered`: those that came with pulls."""
    executables = Executables(limits.credential_bytes)
    sources: list[Logins] = [remembered] if remembered is not None else []
    sources.append(DockerConfig(config.docker_config, executables))
    if config.credential_providers.config:
        programs = config.credential_providers
        sources.append(providers.CredentialProviders(programs.config, programs.bin_dir, executables))
    if config.kube_secrets.kubeconfig:
        sources.append(KubernetesSecrets(config.kube_secrets, limits.kube_secrets_bytes))
    return AllLogins(sources)


def check(config: Registry) -> None:
    """Raises ConfigError for files that cannot be used. Later they only fail what needs them."""
    if config.credential_providers.config:
        providers.load(config.credential_providers.config)
    if config.kube_secrets.kubeconfig:
        kubeconfig.load(config.kube_secrets.kubeconfig)
