//! Disks and machines.

use super::super::strict::{Shape, optional, read_only, required};
use super::ZONES;

use Shape::{Any, Flag, Identities, List, Number, Object, OneOf, Strings, Text};

const DISK_SKUS: &[&str] = &[
    "Standard_LRS",
    "Premium_LRS",
    "StandardSSD_LRS",
    "UltraSSD_LRS",
    "Premium_ZRS",
    "StandardSSD_ZRS",
    "PremiumV2_LRS",
];

/// `PUT disks`.
pub(in crate::azure) static DISK: Shape = resource!(
    "DiskProperties",
    &[
        read_only("provisioningState"),
        read_only("timeCreated"),
        read_only("diskState"),
        read_only("uniqueId"),
        read_only("diskSizeBytes"),
        read_only("encryption"),
        optional("osType", OneOf(&["Linux", "Windows"])),
        optional("hyperVGeneration", OneOf(&["V1", "V2"])),
        required(
            "creationData",
            Object(
                "CreationData",
                &[required(
                    "createOption",
                    OneOf(&["Empty", "FromImage", "Copy", "Import", "Restore", "Upload", "Attach"])
                )]
            )
        ),
        optional("diskSizeGB", Number(1, 65_536)),
        optional("diskIOPSReadWrite", Number(1, 400_000)),
        optional("diskMBpsReadWrite", Number(1, 10_000)),
        optional("maxShares", Number(1, 10)),
        optional("tier", Text),
        optional("networkAccessPolicy", OneOf(&["AllowAll", "AllowPrivate", "DenyAll"])),
        optional("publicNetworkAccess", OneOf(&["Enabled", "Disabled"])),
    ],
    [
        read_only("managedBy"),
        optional("zones", ZONES),
        optional(
            "sku",
            Object("DiskSku", &[optional("name", OneOf(DISK_SKUS)), read_only("tier")])
        ),
    ]
);

/// `PATCH disks`.
pub(in crate::azure) static DISK_UPDATE: Shape = Object(
    "DiskUpdate",
    &[
        optional("tags", Strings),
        optional("sku", Object("DiskSku", &[optional("name", OneOf(DISK_SKUS))])),
        optional(
            "properties",
            Object("DiskUpdateProperties", &[optional("diskSizeGB", Number(1, 65_536))]),
        ),
    ],
);

const DELETE_OPTION: Shape = OneOf(&["Delete", "Detach"]);
const CACHING: Shape = OneOf(&["None", "ReadOnly", "ReadWrite"]);
const MANAGED_DISK: Shape = Object(
    "ManagedDiskParameters",
    &[optional("id", Text), optional("storageAccountType", OneOf(DISK_SKUS))],
);

const STORAGE_PROFILE: Shape = Object(
    "StorageProfile",
    &[
        optional(
            "imageReference",
            Object(
                "ImageReference",
                &[
                    optional("id", Text),
                    optional("publisher", Text),
                    optional("offer", Text),
                    optional("sku", Text),
                    optional("version", Text),
                    read_only("exactVersion"),
                    optional("communityGalleryImageId", Text),
                    optional("sharedGalleryImageId", Text),
                ],
            ),
        ),
        required(
            "osDisk",
            Object(
                "OSDisk",
                &[
                    required("createOption", OneOf(&["FromImage", "Attach", "Empty"])),
                    optional("osType", OneOf(&["Linux", "Windows"])),
                    optional("name", Text),
                    optional("caching", CACHING),
                    optional("diskSizeGB", Number(1, 4_095)),
                    optional("managedDisk", MANAGED_DISK),
                    optional("deleteOption", DELETE_OPTION),
                    optional("writeAcceleratorEnabled", Flag),
                ],
            ),
        ),
        optional(
            "dataDisks",
            List(&Object(
                "DataDisk",
                &[
                    required("lun", Number(0, 63)),
                    required("createOption", OneOf(&["Attach", "Empty"])),
                    optional("name", Text),
                    optional("caching", CACHING),
                    optional("diskSizeGB", Number(1, 65_536)),
                    optional("managedDisk", MANAGED_DISK),
                    optional("deleteOption", DELETE_OPTION),
                    optional("toBeDetached", Flag),
                    optional("writeAcceleratorEnabled", Flag),
                ],
            )),
        ),
        optional("diskControllerType", OneOf(&["SCSI", "NVMe"])),
    ],
);

const OS_PROFILE: Shape = Object(
    "OSProfile",
    &[
        required("computerName", Text),
        optional("adminUsername", Text),
        optional("adminPassword", Text),
        optional("customData", Text),
        optional("allowExtensionOperations", Flag),
        read_only("requireGuestProvisionSignal"),
        optional("secrets", List(&Any)),
        optional(
            "linuxConfiguration",
            Object(
                "LinuxConfiguration",
                &[
                    optional("disablePasswordAuthentication", Flag),
                    optional("provisionVMAgent", Flag),
                    optional("enableVMAgentPlatformUpdates", Flag),
                    optional("patchSettings", Any),
                    optional(
                        "ssh",
                        Object(
                            "SshConfiguration",
                            &[optional(
                                "publicKeys",
                                List(&Object(
                                    "SshPublicKey",
                                    &[required("path", Text), required("keyData", Text)],
                                )),
                            )],
                        ),
                    ),
                ],
            ),
        ),
    ],
);

/// `PUT virtualMachines`.
pub(in crate::azure) static VIRTUAL_MACHINE: Shape = resource!(
    "VirtualMachineProperties",
    &[
        read_only("provisioningState"),
        read_only("vmId"),
        read_only("timeCreated"),
        read_only("instanceView"),
        required(
            "hardwareProfile",
            Object(
                "HardwareProfile",
                &[required("vmSize", Text), optional("vmSizeProperties", Any)]
            )
        ),
        required("storageProfile", STORAGE_PROFILE),
        optional("osProfile", OS_PROFILE),
        required(
            "networkProfile",
            Object(
                "NetworkProfile",
                &[
                    optional("networkApiVersion", Text),
                    required(
                        "networkInterfaces",
                        List(&Object(
                            "NetworkInterfaceReference",
                            &[
                                required("id", Text),
                                optional(
                                    "properties",
                                    Object(
                                        "NetworkInterfaceReferenceProperties",
                                        &[optional("primary", Flag), optional("deleteOption", DELETE_OPTION)]
                                    )
                                ),
                            ]
                        ))
                    ),
                ]
            )
        ),
        optional(
            "securityProfile",
            Object(
                "SecurityProfile",
                &[
                    optional("securityType", OneOf(&["TrustedLaunch", "ConfidentialVM", "Standard"])),
                    optional("encryptionAtHost", Flag),
                    optional(
                        "uefiSettings",
                        Object(
                            "UefiSettings",
                            &[optional("secureBootEnabled", Flag), optional("vTpmEnabled", Flag)]
                        )
                    ),
                ]
            )
        ),
        optional(
            "diagnosticsProfile",
            Object(
                "DiagnosticsProfile",
                &[optional(
                    "bootDiagnostics",
                    Object(
                        "BootDiagnostics",
                        &[optional("enabled", Flag), optional("storageUri", Text)]
                    )
                )]
            )
        ),
        optional("additionalCapabilities", Any),
        optional("priority", OneOf(&["Regular", "Low", "Spot"])),
        optional("userData", Text),
        optional("licenseType", Text),
        optional("extensionsTimeBudget", Text),
    ],
    [
        read_only("managedBy"),
        read_only("resources"),
        optional("zones", ZONES),
        optional(
            "plan",
            Object(
                "Plan",
                &[
                    required("name", Text),
                    required("publisher", Text),
                    required("product", Text),
                    optional("promotionCode", Text)
                ]
            )
        ),
        optional(
            "identity",
            Object(
                "ResourceIdentity",
                &[
                    read_only("principalId"),
                    read_only("tenantId"),
                    required(
                        "type",
                        OneOf(&["SystemAssigned", "UserAssigned", "SystemAssigned, UserAssigned", "None"])
                    ),
                    optional("userAssignedIdentities", Identities),
                ]
            )
        ),
    ]
);
