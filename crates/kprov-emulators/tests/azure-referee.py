"""Drives the Azure Resource Manager of tests with Microsoft's own client libraries.

Usage: azure-referee.py ENDPOINT SUBSCRIPTION TENANT CLIENT SECRET

Makes, follows, lists, changes and deletes one of everything with typed models of azure-mgmt-compute, azure-mgmt-network and
azure-mgmt-resource, and checks what the libraries make of the answers. Fails with a traceback at the first thing that's wrong.
"""

import json
import sys
import urllib.parse
import urllib.request

from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError
from azure.core.pipeline.policies import RetryPolicy, SansIOHTTPPolicy
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.compute import models as compute
from azure.mgmt.network import NetworkManagementClient
from azure.mgmt.network import models as network
from azure.mgmt.resource.resources import ResourceManagementClient
from azure.mgmt.resource.resources import models as resources

ENDPOINT, SUBSCRIPTION, TENANT, CLIENT, SECRET = sys.argv[1:6]
PLACE = "westeurope"
GROUP = "referee"
NETWORK, MACHINES, DISKS, GROUPS, SKUS = "2024-03-01", "2024-07-01", "2024-03-02", "2021-04-01", "2021-07-01"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f referee"


class Bearer(SansIOHTTPPolicy):
    """The libraries' own policy refuses plain HTTP."""

    def __init__(self, token):
        self.token = token

    def on_request(self, request):
        request.http_request.headers["Authorization"] = f"Bearer {self.token}"


def token():
    form = {
        "grant_type": "client_credentials",
        "client_id": CLIENT,
        "client_secret": SECRET,
        "scope": "https://management.azure.com/.default",
    }
    body = urllib.parse.urlencode(form).encode()
    with urllib.request.urlopen(f"{ENDPOINT}/{TENANT}/oauth2/v2.0/token", body) as answer:
        return json.load(answer)["access_token"]


def client(kind, **options):
    # One retry policy with short pauses: a throttled call is to be repeated by the library itself.
    return kind(
        object(),
        SUBSCRIPTION,
        base_url=ENDPOINT,
        authentication_policy=Bearer(TOKEN),
        retry_policy=RetryPolicy(retry_total=5, retry_backoff_factor=0.05),
        polling_interval=0.05,
        **options,
    )


def refused(code, call):
    try:
        call()
    except HttpResponseError as error:
        assert error.error is not None and error.error.code == code, f"{error} instead of {code}"
        return error
    raise AssertionError(f"{code} was expected")


TOKEN = token()
groups = client(ResourceManagementClient, api_version=GROUPS)
net = client(NetworkManagementClient)
vms = client(ComputeManagementClient)
TAGS = {"kprov-cluster": "referee"}

# Groups.
assert not groups.resource_groups.check_existence(GROUP)
refused("ResourceGroupNotFound", lambda: groups.resource_groups.get(GROUP))
made = groups.resource_groups.create_or_update(GROUP, resources.ResourceGroup(location=PLACE, tags=TAGS))
assert made.location == PLACE and made.properties.provisioning_state == "Succeeded", made
assert groups.resource_groups.check_existence(GROUP)

# Network.
sg = net.network_security_groups.begin_create_or_update(
    GROUP,
    "sg",
    network.NetworkSecurityGroup(
        location=PLACE,
        tags=TAGS,
        security_rules=[
            network.SecurityRule(
                name="api",
                protocol="Tcp",
                access="Allow",
                direction="Inbound",
                priority=100,
                source_port_range="*",
                destination_port_ranges=["6443"],
                source_address_prefix="Internet",
                destination_address_prefix="*",
            )
        ],
    ),
    api_version=NETWORK,
).result()
assert sg.provisioning_state == "Succeeded" and sg.security_rules[0].destination_port_ranges == ["6443"], sg


def address(name):
    return net.public_ip_addresses.begin_create_or_update(
        GROUP,
        name,
        network.PublicIPAddress(
            location=PLACE,
            tags=TAGS,
            sku=network.PublicIPAddressSku(name="Standard"),
            public_ip_allocation_method="Static",
            zones=["1", "2", "3"],
        ),
        api_version=NETWORK,
    ).result()


front, out = address("front"), address("out")
assert front.ip_address and front.ip_address != out.ip_address
nat = net.nat_gateways.begin_create_or_update(
    GROUP,
    "nat",
    network.NatGateway(
        location=PLACE,
        tags=TAGS,
        sku=network.NatGatewaySku(name="Standard"),
        public_ip_addresses=[network.SubResource(id=out.id)],
    ),
    api_version=NETWORK,
).result()
vnet = net.virtual_networks.begin_create_or_update(
    GROUP,
    "vnet",
    network.VirtualNetwork(
        location=PLACE,
        tags=TAGS,
        address_space=network.AddressSpace(address_prefixes=["10.1.0.0/16"]),
        subnets=[
            network.Subnet(
                name="machines",
                address_prefix="10.1.0.0/24",
                network_security_group=network.NetworkSecurityGroup(id=sg.id),
                nat_gateway=network.SubResource(id=nat.id),
            )
        ],
    ),
    api_version=NETWORK,
).result()
subnet = vnet.subnets[0]
assert subnet.id.endswith("/subnets/machines") and subnet.network_security_group.id == sg.id, subnet
BALANCER = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}/providers/Microsoft.Network/loadBalancers/api"
balancer = net.load_balancers.begin_create_or_update(
    GROUP,
    "api",
    network.LoadBalancer(
        location=PLACE,
        tags=TAGS,
        sku=network.LoadBalancerSku(name="Standard"),
        frontend_ip_configurations=[
            network.FrontendIPConfiguration(name="front", public_ip_address=network.PublicIPAddress(id=front.id))
        ],
        backend_address_pools=[network.BackendAddressPool(name="pool")],
        probes=[network.Probe(name="ready", protocol="Tcp", port=6443, interval_in_seconds=5, number_of_probes=2)],
        load_balancing_rules=[
            network.LoadBalancingRule(
                name="api",
                protocol="Tcp",
                frontend_port=6443,
                backend_port=6443,
                frontend_ip_configuration=network.SubResource(id=f"{BALANCER}/frontendIPConfigurations/front"),
                backend_address_pool=network.SubResource(id=f"{BALANCER}/backendAddressPools/pool"),
                probe=network.SubResource(id=f"{BALANCER}/probes/ready"),
            )
        ],
    ),
    api_version=NETWORK,
).result()
assert balancer.load_balancing_rules[0].probe.id == balancer.probes[0].id, balancer
used = net.public_ip_addresses.get(GROUP, "front", api_version=NETWORK)
assert used.ip_configuration.id == balancer.frontend_ip_configurations[0].id, used

# Machines, several at once, so that lists have more than one page.
COUNT = 7
interfaces = [
    net.network_interfaces.begin_create_or_update(
        GROUP,
        f"nic{index}",
        network.NetworkInterface(
            location=PLACE,
            tags=TAGS,
            enable_ip_forwarding=True,
            ip_configurations=[
                network.NetworkInterfaceIPConfiguration(
                    name="first",
                    subnet=network.Subnet(id=subnet.id),
                    load_balancer_backend_address_pools=[network.BackendAddressPool(id=balancer.backend_address_pools[0].id)],
                )
            ],
        ),
        api_version=NETWORK,
    )
    for index in range(COUNT)
]
interfaces = [poller.result() for poller in interfaces]
addresses = {i.ip_configurations[0].private_ip_address for i in interfaces}
assert addresses == {f"10.1.0.{4 + index}" for index in range(COUNT)}, addresses
disks = [
    vms.disks.begin_create_or_update(
        GROUP,
        f"disk{index}",
        compute.Disk(
            location=PLACE,
            tags=TAGS,
            zones=[str(index % 3 + 1)],
            sku=compute.DiskSku(name="Premium_LRS"),
            creation_data=compute.CreationData(create_option="Empty"),
            disk_size_gb=8,
        ),
        api_version=DISKS,
    )
    for index in range(COUNT)
]
disks = [poller.result() for poller in disks]
assert all(d.disk_state == "Unattached" and d.provisioning_state == "Succeeded" for d in disks), disks


def machine(index):
    return compute.VirtualMachine(
        location=PLACE,
        tags=TAGS,
        zones=[str(index % 3 + 1)],
        hardware_profile=compute.HardwareProfile(vm_size="Standard_D2s_v5"),
        storage_profile=compute.StorageProfile(
            image_reference=compute.ImageReference(publisher="Debian", offer="debian-12", sku="12-gen2", version="latest"),
            os_disk=compute.OSDisk(create_option="FromImage", delete_option="Delete"),
            data_disks=[
                compute.DataDisk(lun=0, create_option="Attach", managed_disk=compute.ManagedDiskParameters(id=disks[index].id))
            ],
        ),
        os_profile=compute.OSProfile(
            computer_name=f"vm{index}",
            admin_username="kprov",
            custom_data="IyEvYmluL3NoCg==",
            linux_configuration=compute.LinuxConfiguration(
                disable_password_authentication=True,
                ssh=compute.SshConfiguration(
                    public_keys=[compute.SshPublicKey(path="/home/kprov/.ssh/authorized_keys", key_data=KEY)]
                ),
            ),
        ),
        network_profile=compute.NetworkProfile(
            network_interfaces=[compute.NetworkInterfaceReference(id=interfaces[index].id, primary=True)]
        ),
        security_profile=compute.SecurityProfile(
            security_type="TrustedLaunch",
            uefi_settings=compute.UefiSettings(secure_boot_enabled=True, v_tpm_enabled=True),
        ),
        diagnostics_profile=compute.DiagnosticsProfile(boot_diagnostics=compute.BootDiagnostics(enabled=True)),
    )


pollers = [
    vms.virtual_machines.begin_create_or_update(GROUP, f"vm{index}", machine(index), api_version=MACHINES)
    for index in range(COUNT)
]
for poller in pollers:
    vm = poller.result()
    assert vm.provisioning_state == "Succeeded" and vm.os_profile.custom_data is None and vm.vm_id, vm
view = vms.virtual_machines.instance_view(GROUP, "vm0", api_version=MACHINES)
assert [s.code for s in view.statuses] == ["ProvisioningState/succeeded", "PowerState/running"], view
expanded = vms.virtual_machines.get(GROUP, "vm0", expand="instanceView", api_version=MACHINES)
assert expanded.instance_view.statuses[1].code == "PowerState/running"
assert vms.disks.get(GROUP, "disk0", api_version=DISKS).managed_by == expanded.id

# Lists, over all their pages.
assert len(list(vms.virtual_machines.list(GROUP, api_version=MACHINES))) == COUNT
assert len(list(vms.virtual_machines.list_all(api_version=MACHINES))) == COUNT
status = list(vms.virtual_machines.list_all(status_only="true", api_version=MACHINES))
assert {s.instance_view.statuses[1].code for s in status} == {"PowerState/running"}
assert len(list(net.network_interfaces.list(GROUP, api_version=NETWORK))) == COUNT
# The data disks, and every machine's system disk.
assert len(list(vms.disks.list_by_resource_group(GROUP, api_version=DISKS))) == 2 * COUNT
tagged = list(groups.resources.list(filter="tagName eq 'kprov-cluster' and tagValue eq 'referee'"))
assert len(tagged) == 6 + 4 * COUNT, [t.id for t in tagged]
sizes = list(vms.resource_skus.list(filter=f"location eq '{PLACE}'", api_version=SKUS))
assert "Standard_D2s_v5" in {s.name for s in sizes} and all(s.location_info[0].zones for s in sizes), sizes
cores = next(u for u in vms.usage.list(PLACE, api_version=MACHINES) if u.name.value == "cores")
assert cores.current_value == 2 * COUNT, cores
members = net.load_balancers.get(GROUP, "api", api_version=NETWORK).backend_address_pools[0].backend_ip_configurations
assert len(members) == COUNT, members

# What is refused, as the libraries understand it.
refused("InvalidApiVersionParameter", lambda: vms.virtual_machines.get(GROUP, "vm0", api_version="2019-12-01"))
refused("NicInUse", lambda: net.network_interfaces.begin_delete(GROUP, "nic0", api_version=NETWORK))
refused("InUseSubnetCannotBeDeleted", lambda: net.virtual_networks.begin_delete(GROUP, "vnet", api_version=NETWORK))
refused("PublicIPAddressCannotBeDeleted", lambda: net.public_ip_addresses.begin_delete(GROUP, "front", api_version=NETWORK))
try:
    vms.disks.begin_delete(GROUP, "disk0", api_version=DISKS)
    raise AssertionError("an attached disk was deleted")
except ResourceExistsError as error:
    assert error.error.code == "OperationNotAllowed", error
changed = machine(0)
changed.os_profile.custom_data = "aGVsbG8K"
refused(
    "PropertyChangeNotAllowed",
    lambda: vms.virtual_machines.begin_create_or_update(GROUP, "vm0", changed, api_version=MACHINES),
)
try:
    vms.virtual_machines.get(GROUP, "nobody", api_version=MACHINES)
    raise AssertionError("a machine that isn't there was found")
except ResourceNotFoundError as error:
    assert error.error.code == "ResourceNotFound", error

# A whole machine as it was read, put back.
again = vms.virtual_machines.get(GROUP, "vm1", api_version=MACHINES)
assert vms.virtual_machines.begin_create_or_update(GROUP, "vm1", again, api_version=MACHINES).result().vm_id == again.vm_id

# Stopped and started.
vms.virtual_machines.begin_deallocate(GROUP, "vm0", api_version=MACHINES).result()
view = vms.virtual_machines.instance_view(GROUP, "vm0", api_version=MACHINES)
assert view.statuses[1].code == "PowerState/deallocated", view
vms.virtual_machines.begin_start(GROUP, "vm0", api_version=MACHINES).result()
log = vms.virtual_machines.retrieve_boot_diagnostics_data(GROUP, "vm0", api_version=MACHINES)
assert log.serial_console_log_blob_uri.startswith(ENDPOINT), log

# Deleted in order of dependencies, all but one machine; that goes with the group.
for poller in [vms.virtual_machines.begin_delete(GROUP, f"vm{i}", api_version=MACHINES) for i in range(1, COUNT)]:
    poller.result()
for poller in [net.network_interfaces.begin_delete(GROUP, f"nic{i}", api_version=NETWORK) for i in range(1, COUNT)]:
    poller.result()
for poller in [vms.disks.begin_delete(GROUP, f"disk{i}", api_version=DISKS) for i in range(1, COUNT)]:
    poller.result()
assert len(list(vms.disks.list_by_resource_group(GROUP, api_version=DISKS))) == 2
groups.resource_groups.begin_delete(GROUP).result()
assert not groups.resource_groups.check_existence(GROUP)
assert list(groups.resources.list()) == []
print("everything as Microsoft's libraries expect it")
