//! Management controllers over Redfish: a stand-in that misbehaves as real ones do, and sushy-tools' emulator, which is
//! somebody else's reading of the specification.

#![cfg(test)]

use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kprov_emulators::bmc::{Manners, PASSWORD, StandIn, USER};
use kprov_provider_baremetal::inventory::{Bmc as Entry, Credentials};
use kprov_provider_baremetal::redfish::{Bmc, BmcError, BootTarget, Limits, Login, PowerState};

const QUICK: Limits = Limits {
    request: Duration::from_millis(500),
    silence: Duration::from_secs(3),
    change: Duration::from_secs(2),
    look: Duration::from_millis(20),
};

fn entry(url: &str) -> Entry {
    Entry {
        address: url.into(),
        credentials: Credentials::Env("KPROV_TEST_NO_SUCH_VARIABLE".into()),
        system: None,
        ca_file: None,
        insecure: false,
        mac: None,
    }
}

fn login(password: &str) -> Login {
    Login {
        user: USER.into(),
        password: password.into(),
    }
}

async fn stand_in(manners: Manners) -> StandIn {
    StandIn::start(manners, Box::new(|_| {})).await.unwrap()
}

async fn open(bmc: &StandIn) -> Result<Bmc, BmcError> {
    Bmc::open_with(&entry(&bmc.url()), login(PASSWORD), QUICK).await
}

#[tokio::test]
async fn power_and_boot_source_reach_the_system() {
    let seen: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
    let hook = seen.clone();
    let bmc = StandIn::start(
        Manners::default(),
        Box::new(move |power| hook.lock().unwrap().push(power.map(|boot| boot.target.to_owned()))),
    )
    .await
    .unwrap();
    let client = open(&bmc).await.unwrap();
    assert_eq!(client.power().await.unwrap(), PowerState::Off);
    client.boot_once(BootTarget::Pxe).await.unwrap();
    client.power_on().await.unwrap();
    assert_eq!(client.power().await.unwrap(), PowerState::On);
    client.power_on().await.unwrap();
    client.restart().await.unwrap();
    client.power_off().await.unwrap();
    client.power_off().await.unwrap();
    let seen: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .map(|p| p.clone().unwrap_or("off".into()))
        .collect();
    assert_eq!(
        seen,
        ["Pxe", "off", "Hdd", "off"],
        "from the network once, and nothing done twice"
    );
}

#[tokio::test]
async fn manners_of_different_makers() {
    type Edit = fn(&mut Manners);
    let cases: &[(&str, Edit)] = &[
        ("allowed values in an ActionInfo", |m| m.by_info = true),
        ("no allowed values", |m| m.resets = None),
        ("only ForceOn", |m| m.resets = Some(vec!["ForceOn", "ForceOff"])),
        ("only a power button", |m| m.resets = Some(vec!["PushPowerButton"])),
        ("If-Match", |m| m.wants_etag = true),
        ("settings apart", |m| m.settings_apart = true),
        ("Once reads back as Continuous", |m| m.continuous = true),
        ("plain InsertMedia", |m| m.plain_media = true),
        ("no actions for media", |m| m.old_media = true),
        ("busy at first", |m| m.busy = 2),
        ("an action ignored once", |m| m.ignores = 1),
    ];
    for (what, edit) in cases {
        let mut manners = Manners::default();
        edit(&mut manners);
        let bmc = stand_in(manners).await;
        let run = async {
            let client = open(&bmc).await?;
            client.boot_once(BootTarget::Pxe).await?;
            assert_eq!(bmc.boots_from().as_deref(), Some("Pxe"), "{what}");
            client.power_on().await?;
            assert!(bmc.is_on(), "{what}");
            client.boot_as_before().await?;
            assert_eq!(bmc.boots_from(), None, "{what}");
            client.insert_media("http://10.0.0.1/a.iso").await?;
            client.insert_media("http://10.0.0.1/b.iso").await?;
            assert_eq!(bmc.image().as_deref(), Some("http://10.0.0.1/b.iso"), "{what}");
            client.eject_media().await?;
            client.eject_media().await?;
            assert_eq!(bmc.image(), None, "{what}");
            client.power_off().await?;
            assert!(!bmc.is_on(), "{what}");
            Ok::<_, BmcError>(())
        };
        if let Err(error) = run.await {
            panic!("{what}: {error} ({})", error.hint());
        }
    }
}

#[tokio::test]
async fn a_lost_reply_is_looked_after_not_repeated_blindly() {
    let bmc = stand_in(Manners {
        loses_replies: true,
        ..Manners::default()
    })
    .await;
    let client = open(&bmc).await.unwrap();
    client.power_on().await.unwrap();
    assert!(bmc.is_on());
    assert_eq!(bmc.record.calls()["POST /redfish/v1/Systems/1/reset"], 1);
}

#[tokio::test]
async fn what_goes_wrong_is_named_with_a_hint() {
    // Wrong credentials; the password is in no error.
    let bmc = stand_in(Manners::default()).await;
    let wrong = Bmc::open_with(&entry(&bmc.url()), login("s3cr3t"), QUICK)
        .await
        .unwrap_err();
    assert!(matches!(wrong, BmcError::Unauthorized { .. }), "{wrong}");
    assert!(!format!("{wrong:?} {wrong} {}", wrong.hint()).contains("s3cr3t"));
    let asked = bmc.record.calls()["GET /redfish/v1/Systems"];
    assert_eq!(asked, 1, "an account may be locked after a few tries");
    let missing = Bmc::open(&entry(&bmc.url()), QUICK).await.unwrap_err();
    assert!(missing.to_string().contains("KPROV_TEST_NO_SUCH_VARIABLE"), "{missing}");

    // Stops answering, in the middle.
    let client = open(&bmc).await.unwrap();
    bmc.behave(|m| m.silent = true);
    let silent = client.power_on().await.unwrap_err();
    assert!(
        matches!(silent, BmcError::Silent { tried, .. } if tried >= Duration::from_secs(1)),
        "{silent:?}"
    );
    assert!(!bmc.is_on());
    // Not there at all.
    let url = bmc.url();
    drop(bmc);
    let gone = Bmc::open_with(&entry(&url), login(PASSWORD), QUICK).await.unwrap_err();
    assert!(matches!(gone, BmcError::Silent { .. }), "{gone:?}");

    // Says yes and does nothing.
    let bmc = stand_in(Manners {
        ignores: 10,
        ..Manners::default()
    })
    .await;
    let ignored = open(&bmc).await.unwrap().power_on().await.unwrap_err();
    assert!(
        ignored.to_string().contains("accepted to switch the system on 2 times"),
        "{ignored}"
    );
    assert!(ignored.to_string().contains("still off"), "{ignored}");

    // Cannot.
    let bmc = stand_in(Manners {
        resets: Some(vec!["Nmi"]),
        targets: vec!["Hdd", "UefiHttp"],
        ..Manners::default()
    })
    .await;
    let client = open(&bmc).await.unwrap();
    let cannot = client.power_on().await.unwrap_err();
    assert!(
        cannot
            .to_string()
            .ends_with("cannot switch the system on; it offers `Nmi`"),
        "{cannot}"
    );
    let cannot = client.boot_once(BootTarget::Pxe).await.unwrap_err();
    assert!(cannot.to_string().contains("it offers `Hdd`, `UefiHttp`"), "{cannot}");

    // Accepts what to boot from, and nothing comes of it.
    let bmc = stand_in(Manners {
        forgets_boot: true,
        ..Manners::default()
    })
    .await;
    let error = open(&bmc).await.unwrap().boot_once(BootTarget::Cd).await.unwrap_err();
    assert!(matches!(error, BmcError::Ignored { asked: 2, .. }), "{error}");

    // Several systems, or none, or something else than Redfish.
    let bmc = stand_in(Manners {
        systems: 2,
        ..Manners::default()
    })
    .await;
    let several = open(&bmc).await.unwrap_err();
    assert!(
        several.to_string().ends_with("manages several systems (`1`, `2`)"),
        "{several}"
    );
    assert!(several.hint().contains("bmc.system"));
    for (name, found) in [("2", true), ("s2", true), ("3", false)] {
        let mut named = entry(&bmc.url());
        named.system = Some(name.into());
        let opened = Bmc::open_with(&named, login(PASSWORD), QUICK).await;
        assert_eq!(opened.is_ok(), found, "{name}");
    }
    let bmc = stand_in(Manners {
        systems: 0,
        ..Manners::default()
    })
    .await;
    assert!(open(&bmc).await.unwrap_err().to_string().ends_with("manages no system"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>")
                .await;
        }
    });
    let other = Bmc::open_with(&entry(&url), login(PASSWORD), QUICK).await.unwrap_err();
    assert!(matches!(other, BmcError::NotRedfish { .. }), "{other}");
}

/// sushy-tools' emulator with a fake system; ends with the test.
struct Sushy {
    child: Child,
    url: String,
    certificate: String,
    directory: tempfile::TempDir,
}

/// A self-signed certificate for another name than the one that is used here, as controllers have them, and its key.
fn self_signed(directory: &std::path::Path, name: &str) -> (std::path::PathBuf, std::path::PathBuf) {
    let (certificate, key) = (
        directory.join(format!("{name}.pem")),
        directory.join(format!("{name}.key")),
    );
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=bmc.example",
            "-keyout",
        ])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    (certificate, key)
}

impl Drop for Sushy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sushy {
    fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    fn start() -> Option<Self> {
        let Ok(program) = std::env::var("KPROV_TEST_SUSHY") else {
            assert!(
                std::env::var_os("KPROV_BIN").is_none(),
                "`cargo xtask test` names the emulator in KPROV_TEST_SUSHY"
            );
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        // admin:password, by bcrypt.
        let users = directory.path().join("users");
        std::fs::write(
            &users,
            "admin:$2b$05$iNYvPGpODLsNQ87iKKd9ueNvsEWeFsiPzEdJ6fJKnFmWePKEPBmAq\n",
        )
        .unwrap();
        let config = directory.path().join("config.py");
        std::fs::write(&config, format!("SUSHY_EMULATOR_AUTH_FILE = '{}'\n", users.display())).unwrap();
        let (certificate, key) = self_signed(directory.path(), "bmc");
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let child = Command::new(program)
            .args(["--fake", "-i", "127.0.0.1", "-p", &port.to_string(), "--config"])
            .arg(&config)
            .arg("--ssl-certificate")
            .arg(&certificate)
            .arg("--ssl-key")
            .arg(&key)
            .current_dir(directory.path())
            .env("HOME", directory.path())
            .env("TMPDIR", directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Some(Self {
            child,
            url: format!("https://127.0.0.1:{port}"),
            certificate: certificate.display().to_string(),
            directory,
        })
    }
}

#[tokio::test]
async fn sushy_tools() {
    let Some(sushy) = Sushy::start() else {
        eprintln!("SKIPPED: KPROV_TEST_SUSHY names no sushy-emulator");
        return;
    };
    let limits = Limits {
        request: Duration::from_secs(5),
        silence: Duration::from_secs(40),
        change: Duration::from_secs(40),
        look: Duration::from_millis(200),
    };
    let pinned = Entry {
        ca_file: Some(sushy.certificate.clone()),
        ..entry(&sushy.url)
    };
    let client = Bmc::open_with(&pinned, login("password"), limits).await.unwrap();
    let wrong = Bmc::open_with(&pinned, login("wrong"), limits).await.unwrap_err();
    assert!(matches!(wrong, BmcError::Unauthorized { .. }), "{wrong}");
    // Another certificate than the one named, and one that nobody has named.
    let (another, _) = self_signed(sushy.directory.path(), "another");
    let other = Entry {
        ca_file: Some(another.display().to_string()),
        ..pinned.clone()
    };
    for entry in [other, entry(&sushy.url)] {
        let refused = Bmc::open_with(&entry, login("password"), limits).await.unwrap_err();
        assert!(matches!(refused, BmcError::Tls { .. }), "{refused:?}");
    }
    let insecure = Entry {
        insecure: true,
        ..entry(&sushy.url)
    };
    assert!(Bmc::open_with(&insecure, login("password"), limits).await.is_ok());

    assert_eq!(client.power().await.unwrap(), PowerState::Off);
    for target in [BootTarget::Pxe, BootTarget::Cd] {
        client.boot_once(target).await.unwrap();
    }
    // It takes `UefiHttp` too, with a 204, and sets something else: told, not taken for done.
    let hasty = Limits {
        request: Duration::from_secs(1),
        silence: Duration::from_secs(2),
        change: Duration::from_secs(3),
        ..limits
    };
    let impatient = Bmc::open_with(&pinned, login("password"), hasty).await.unwrap();
    let ignored = impatient.boot_once(BootTarget::UefiHttp).await.unwrap_err();
    assert!(matches!(ignored, BmcError::Ignored { asked: 2, .. }), "{ignored:?}");
    assert!(ignored.to_string().contains("set to boot from `Pxe`"), "{ignored}");
    // It stops answering, and goes on where it was.
    sushy.signal("STOP");
    let silent = impatient.power_on().await.unwrap_err();
    assert!(matches!(silent, BmcError::Silent { .. }), "{silent:?}");
    sushy.signal("CONT");
    assert_eq!(client.power().await.unwrap(), PowerState::Off);
    client.power_on().await.unwrap();
    assert_eq!(client.power().await.unwrap(), PowerState::On);
    client.boot_as_before().await.unwrap();
    // The image is really fetched.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let image = format!("http://{}/installer.iso", listener.local_addr().unwrap());
    let fetched = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = fetched.clone();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\niso")
                .await;
        }
    });
    client.insert_media(&image).await.unwrap();
    assert!(fetched.load(std::sync::atomic::Ordering::SeqCst) > 0);
    client.eject_media().await.unwrap();
    client.power_off().await.unwrap();
    assert_eq!(client.power().await.unwrap(), PowerState::Off);
}
