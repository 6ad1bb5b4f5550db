//! What Microsoft.Compute checks and adds when a disk or a machine is put, and what a machine takes with it.

use std::collections::BTreeSet;
use std::time::Instant;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::catalogue::{self, Image, Size};
use super::kind::Kind;
use super::machine::{check_image, check_os, parameter, unchangeable, unchanged};
use super::refusal::Refusal;
use super::room::Event;
use super::store::{Resource, State, Store, guid, text};

impl Store {
    pub(super) fn prepare_disk(
        &mut self,
        id: &str,
        body: &mut Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        let option = text(&body["properties"], "/creationData/createOption").unwrap_or_default();
        if !option.eq_ignore_ascii_case("Empty") {
            return Err(parameter(
                "creationData.createOption",
                format!("This server makes empty disks alone, and `{option}` was asked for."),
            ));
        }
        let size = body["properties"]["diskSizeGB"].as_i64();
        let Some(size) = size else {
            return Err(parameter(
                "disk.diskSizeGB",
                "Required parameter 'disk.diskSizeGB' is missing (null).",
            ));
        };
        let sku = body
            .get("sku")
            .and_then(|s| text(s, "/name"))
            .unwrap_or("Standard_LRS")
            .to_owned();
        body.insert("sku".to_owned(), json!({"name": sku, "tier": sku.split('_').next()}));
        let serial = self.serial();
        let properties = &mut body["properties"];
        match old {
            None => {
                properties["uniqueId"] = json!(guid(serial));
                properties["timeCreated"] = json!(Timestamp::now().to_string());
            }
            Some(old) => {
                let before = old.properties();
                if before.get("creationData") != properties.get("creationData") {
                    return Err(unchangeable("disk.creationData"));
                }
                if before
                    .get("diskSizeGB")
                    .and_then(Value::as_i64)
                    .is_some_and(|b| size < b)
                {
                    return Err(Refusal::new(
                        400,
                        "BadRequest",
                        format!(
                            "Disk {id} cannot be resized to {size} GB: the new size has to be at least the current one."
                        ),
                    )
                    .target("disk.diskSizeGB"));
                }
                for kept in ["uniqueId", "timeCreated"] {
                    properties[kept] = before.get(kept).cloned().unwrap_or_default();
                }
            }
        }
        properties["diskSizeBytes"] = json!(size << 30);
        Ok(())
    }

    pub(super) fn prepare_machine(
        &mut self,
        id: &str,
        group: &str,
        body: &mut Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        let whole = Value::Object(body.clone());
        let location = text(&whole, "/location").unwrap_or_default().to_owned();
        let zone = text(&whole, "/zones/0").map(str::to_owned);
        let size = self.check_size(&whole, &location, zone.as_deref(), old)?;
        check_os(&whole, old)?;
        self.check_identity(id, body)?;
        if let Some(old) = old {
            unchanged(&whole, &Value::Object(old.body.clone()))?;
        }
        let image = check_image(&whole, size)?;
        self.check_interfaces(&whole, id, size)?;
        self.check_data_disks(&whole, id, zone.as_deref(), size)?;

        let serial = self.serial();
        let name = id.rsplit('/').next().unwrap_or_default().to_owned();
        let properties = &mut body["properties"];
        if let Some(old) = old {
            for kept in ["vmId", "timeCreated"] {
                properties[kept] = old.properties().get(kept).cloned().unwrap_or_default();
            }
            if properties.get("osProfile").is_none()
                && let Some(kept) = old.properties().get("osProfile")
            {
                properties["osProfile"] = kept.clone();
            } else if let Some(kept) = old.properties().get("osProfile").and_then(|o| o.get("customData")) {
                properties["osProfile"]["customData"] = kept.clone();
            }
            let before = &old.properties()["storageProfile"]["osDisk"];
            for kept in ["name", "managedDisk", "diskSizeGB"] {
                properties["storageProfile"]["osDisk"][kept] = before.get(kept).cloned().unwrap_or_default();
            }
            return Ok(());
        }
        properties["vmId"] = json!(guid(serial));
        properties["timeCreated"] = json!(Timestamp::now().to_string());
        self.make_system_disk(group, &name, body, image)
    }

    /// The system disk is a resource of its own, with the machine's tags.
    fn make_system_disk(
        &mut self,
        group: &str,
        machine: &str,
        body: &mut Map<String, Value>,
        image: &'static Image,
    ) -> Result<(), Refusal> {
        let Some(kind) = Kind::named("disks") else {
            return Ok(());
        };
        let serial = self.serial();
        let os_disk = &body["properties"]["storageProfile"]["osDisk"];
        let name = match text(os_disk, "/name") {
            Some(name) => name.to_owned(),
            None => format!("{machine}_OsDisk_1_{serial:032x}"),
        };
        kind.check_name(&name)?;
        let id = self.id(group, kind, &name);
        if self.get(&id).is_some() {
            return Err(Refusal::new(
                409,
                "ConflictingUserInput",
                format!(
                    "Disk {name} already exists in resource group {}. Only CreateOption.Attach is supported.",
                    group.to_uppercase()
                ),
            )
            .target("/dataDisk"));
        }
        let size = os_disk
            .get("diskSizeGB")
            .and_then(Value::as_i64)
            .unwrap_or(image.disk_gib);
        if size < image.disk_gib {
            return Err(parameter(
                "osDisk.diskSizeGB",
                format!(
                    "The specified disk size {size} GB is smaller than the size of the corresponding disk in the VM image: {} GB. \
                     This is not allowed. Please choose equal or greater size or do not specify an explicit size.",
                    image.disk_gib
                ),
            ));
        }
        let storage = text(os_disk, "/managedDisk/storageAccountType")
            .unwrap_or("Standard_LRS")
            .to_owned();
        let option = text(os_disk, "/deleteOption").unwrap_or("Detach").to_owned();
        let mut disk = Map::new();
        for copied in ["location", "tags", "zones"] {
            if let Some(value) = body.get(copied) {
                disk.insert(copied.to_owned(), value.clone());
            }
        }
        disk.insert(
            "sku".to_owned(),
            json!({"name": storage, "tier": storage.split('_').next()}),
        );
        disk.insert(
            "properties".to_owned(),
            json!({
                "osType": "Linux",
                "hyperVGeneration": image.generation,
                "creationData": {"createOption": "FromImage"},
                "diskSizeGB": size,
                "diskSizeBytes": size << 30,
                "uniqueId": guid(serial),
                "timeCreated": Timestamp::now().to_string(),
            }),
        );
        let os_disk = &mut body["properties"]["storageProfile"]["osDisk"];
        os_disk["name"] = json!(name);
        os_disk["osType"] = json!("Linux");
        os_disk["deleteOption"] = json!(option);
        os_disk["diskSizeGB"] = json!(size);
        os_disk["managedDisk"] = json!({"id": id, "storageAccountType": storage});
        let disk = Resource {
            kind,
            id: id.clone(),
            group: group.to_owned(),
            name,
            body: disk,
            state: State::Succeeded,
            etag: serial,
            created: Timestamp::now(),
            listed: Instant::now(),
            power: None,
            failure: None,
        };
        self.resources.insert(id.to_ascii_lowercase(), disk);
        Ok(())
    }

    fn check_size(
        &self,
        whole: &Value,
        location: &str,
        zone: Option<&str>,
        old: Option<&Resource>,
    ) -> Result<&'static Size, Refusal> {
        let name = text(whole, "/properties/hardwareProfile/vmSize").unwrap_or_default();
        let size = catalogue::size(name).ok_or_else(|| {
            let valid = catalogue::SIZES.iter().map(|s| s.name).collect::<Vec<_>>().join(",");
            parameter(
                "vmSize",
                format!(
                    "The value {name} provided for the VM size is not valid. The valid sizes in the current region are: {valid}. \
                     Find out more on the valid VM sizes in each region at https://aka.ms/azure-regions."
                ),
            )
        })?;
        let before = old.and_then(|o| catalogue::size(o.properties().get("hardwareProfile")?.get("vmSize")?.as_str()?));
        if before.is_some_and(|b| b.name == size.name) {
            return Ok(size);
        }
        if self.restricted(size.name, zone) {
            return Err(Refusal::new(
                409,
                "SkuNotAvailable",
                format!(
                    "The requested VM size for resource 'Following SKUs have failed for Capacity Restrictions: {}' is currently \
                     not available in location '{location}'. Please try another size or deploy to a different location or \
                     different zone. See https://aka.ms/azureskunotavailable for details.",
                    size.name
                ),
            ));
        }
        for (quota, limit, used) in [
            ("Total Regional Cores", self.limit("cores"), self.cores(location, None)),
            (
                size.family,
                self.limit(size.family),
                self.cores(location, Some(size.family)),
            ),
        ] {
            if used + size.cores > limit {
                let quota = if quota == size.family {
                    format!("{quota} Cores")
                } else {
                    quota.to_owned()
                };
                return Err(Refusal::new(
                    409,
                    "OperationNotAllowed",
                    format!(
                        "Operation could not be completed as it results in exceeding approved {quota} quota. Additional details - \
                         Deployment Model: Resource Manager, Location: {location}, Current Limit: {limit}, Current Usage: {used}, \
                         Additional Required: {}, (Minimum) New Limit Required: {}. Setup Alerts when Quota reaches threshold. \
                         Learn more at https://aka.ms/quotamonitoringalerting . Please read more about quota limits at \
                         https://docs.microsoft.com/en-us/azure/azure-supportability/per-vm-quota-requests",
                        size.cores,
                        used + size.cores
                    ),
                ));
            }
        }
        Ok(size)
    }

    fn check_identity(&self, id: &str, body: &mut Map<String, Value>) -> Result<(), Refusal> {
        let Some(identity) = body.get_mut("identity") else {
            return Ok(());
        };
        let user = text(identity, "/type").is_some_and(|t| t.contains("UserAssigned"));
        let named = identity
            .get_mut("userAssignedIdentities")
            .and_then(Value::as_object_mut);
        if user != named.as_ref().is_some_and(|n| !n.is_empty()) {
            return Err(Refusal::new(
                400,
                "InvalidIdentityValues",
                format!(
                    "The identity of resource '{id}' names user-assigned identities and its type doesn't say so, or the other way round."
                ),
            ));
        }
        for (name, value) in named.into_iter().flatten() {
            if !self.options.identities.iter().any(|i| i.eq_ignore_ascii_case(name)) {
                return Err(Refusal::new(
                    400,
                    "FailedIdentityOperation",
                    format!(
                        "Identity operation for resource '{id}' failed with error 'Failed to perform resource identity operation. \
                         Status: 'BadRequest'. Response: '{{\"error\":{{\"code\":\"BadRequest\",\"message\":\"Resource '{name}' was \
                         not found.\"}}}}'.'."
                    ),
                ));
            }
            *value = json!({"principalId": guid(1), "clientId": guid(2)});
        }
        Ok(())
    }

    fn check_interfaces(&self, whole: &Value, id: &str, size: &Size) -> Result<(), Refusal> {
        let list = whole
            .pointer("/properties/networkProfile/networkInterfaces")
            .and_then(Value::as_array);
        let list: Vec<&Value> = list.into_iter().flatten().collect();
        if list.is_empty() {
            return Err(parameter(
                "networkProfile.networkInterfaces",
                "The VM must have at least one network interface.",
            ));
        }
        let marked = list
            .iter()
            .filter(|n| n.pointer("/properties/primary") == Some(&json!(true)))
            .count();
        if list.len() > 1 && marked != 1 {
            return Err(Refusal::new(
                400,
                "VirtualMachineMustHaveOneNetworkInterfaceAsPrimary",
                format!("Virtual machine {id} must have one network interface set as the primary."),
            ));
        }
        let uses = self.uses();
        for item in list {
            let interface = text(item, "/id").unwrap_or_default();
            if let Some(by) = uses.of(interface).iter().find(|by| !by.eq_ignore_ascii_case(id)) {
                return Err(Refusal::new(
                    400,
                    "NicInUse",
                    format!(
                        "Network Interface {interface} is used by existing resource {by}. In order to use the network interface, \
                         it must be dissociated from the resource. To learn more, see aka.ms/deletenic."
                    ),
                ));
            }
            let accelerated = self
                .get(interface)
                .is_some_and(|n| n.properties().get("enableAcceleratedNetworking") == Some(&json!(true)));
            if accelerated && !size.accelerated {
                return Err(Refusal::new(
                    400,
                    "VMSizeIsNotPermittedToEnableAcceleratedNetworkingForVmList",
                    format!(
                        "VM size {} is not permitted to enable accelerated networking on network interface {interface}.",
                        size.name
                    ),
                ));
            }
        }
        Ok(())
    }

    fn check_data_disks(&self, whole: &Value, id: &str, zone: Option<&str>, size: &Size) -> Result<(), Refusal> {
        let disks = whole
            .pointer("/properties/storageProfile/dataDisks")
            .and_then(Value::as_array);
        let disks: Vec<&Value> = disks.into_iter().flatten().collect();
        if disks.len() > size.data_disks {
            return Err(Refusal::new(
                409,
                "OperationNotAllowed",
                format!(
                    "The maximum number of data disks allowed to be attached to a VM of this size is {}.",
                    size.data_disks
                ),
            )
            .target("dataDisks"));
        }
        let mut luns = BTreeSet::new();
        let uses = self.uses();
        for item in disks {
            if !luns.insert(item["lun"].as_i64()) {
                return Err(parameter(
                    "dataDisk.lun",
                    format!("LUN {} is used by more than one disk.", item["lun"]),
                ));
            }
            if !text(item, "/createOption").is_some_and(|o| o.eq_ignore_ascii_case("Attach")) {
                return Err(parameter(
                    "dataDisk.createOption",
                    "This server attaches disks that exist, and makes none with a machine.",
                ));
            }
            let Some(disk_id) = text(item, "/managedDisk/id") else {
                return Err(parameter(
                    "dataDisk.managedDisk.id",
                    "Required parameter 'dataDisk.managedDisk.id' is missing (null).",
                ));
            };
            let disk = self.get(disk_id).filter(|d| d.is("disks"));
            let Some(disk) = disk else {
                return Err(Refusal::not_found(
                    "Microsoft.Compute/disks",
                    disk_id.rsplit('/').next().unwrap_or_default(),
                    disk_id.split('/').nth(4).unwrap_or_default(),
                ));
            };
            if let Some(by) = uses.of(disk_id).iter().find(|by| !by.eq_ignore_ascii_case(id)) {
                return Err(Refusal::new(
                    409,
                    "ConflictingUserInput",
                    format!("Disk '{disk_id}' cannot be attached as the disk is already owned by VM '{by}'."),
                )
                .target("/dataDisk"));
            }
            if disk.zone() != zone {
                return Err(Refusal::new(
                    400,
                    "BadRequest",
                    format!(
                        "Disk {} cannot be attached to the VM because it is not in the same zone as the VM. VM zone: '{}'. Disk \
                         zone: '{}'.",
                        disk.name,
                        zone.unwrap_or_default(),
                        disk.zone().unwrap_or_default()
                    ),
                )
                .target("/dataDisk"));
            }
            let premium = disk
                .body
                .get("sku")
                .and_then(|s| text(s, "/name"))
                .is_some_and(|s| s.starts_with("Premium"));
            if premium && !size.premium {
                return Err(Refusal::new(
                    400,
                    "InvalidParameter",
                    format!(
                        "Requested operation cannot be performed because the VM size {} does not support the storage account type Premium_LRS of disk '{}'.",
                        size.name, disk.name
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Whether a disk can be deleted now.
    pub(super) fn check_disk_delete(&self, disk: &Resource) -> Result<(), Refusal> {
        match self.uses().of(&disk.id).first() {
            None => Ok(()),
            Some(by) => Err(Refusal::new(
                409,
                "OperationNotAllowed",
                format!("Disk {} is attached to VM {by}.", disk.name),
            )
            .target("disk")),
        }
    }

    /// Takes a resource away, and what goes with it.
    pub(super) fn remove(&mut self, id: &str) {
        let Some(resource) = self.resources.remove(&id.to_ascii_lowercase()) else {
            return;
        };
        let Resource {
            id, name, kind, body, ..
        } = resource;
        match kind.plural {
            "loadBalancers" => self.leave_pools(&id),
            "disks" => self.tell(Event::DiskDeleted { id, name }),
            "virtualMachines" => {
                self.consoles.remove(&id.to_ascii_lowercase());
                self.tell(Event::Deleted { id, name });
                let body = Value::Object(body);
                for along in deleted_along(&body) {
                    self.remove(&along);
                }
            }
            _ => {}
        }
    }
}

/// The ids of disks and interfaces whose `deleteOption` is `Delete`.
fn deleted_along(machine: &Value) -> Vec<String> {
    let disks = machine
        .pointer("/properties/storageProfile/dataDisks")
        .and_then(Value::as_array);
    let disks = disks
        .into_iter()
        .flatten()
        .chain(machine.pointer("/properties/storageProfile/osDisk"));
    let disks = disks
        .filter(|d| text(d, "/deleteOption") == Some("Delete"))
        .filter_map(|d| text(d, "/managedDisk/id"));
    let interfaces = machine
        .pointer("/properties/networkProfile/networkInterfaces")
        .and_then(Value::as_array);
    let interfaces = interfaces
        .into_iter()
        .flatten()
        .filter(|n| text(n, "/properties/deleteOption") == Some("Delete"))
        .filter_map(|n| text(n, "/id"));
    disks.chain(interfaces).map(str::to_owned).collect()
}
