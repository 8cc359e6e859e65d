//! `ply layer`.

use std::process::ExitCode;

use plies_engine::exec::Cancel;
use plies_engine::{Engine, IdMaps, IdRange, Input, LayerSummary, Output, RemovedLayerSummary, RwSummary};
use serde_json::json;

use crate::args::{Layer, Rw};
use crate::commands::{absolute, ago, collect, print, print_json, say};
use crate::format::{self, Column};
use crate::progress::Style;

/// Runs one of its commands.
pub(crate) fn run(
    engine: &Engine,
    command: Layer,
    json: bool,
    style: Style,
    cancel: &Cancel,
) -> anyhow::Result<ExitCode> {
    match command {
        Layer::Register { parent, file } => {
            let input = if file.as_os_str() == "-" { Input::Stdin } else { Input::Path(file) };
            let layer = engine.register_layer(&input, parent.as_deref(), &*style.renderer(), cancel)?;
            return print_layer(&layer, json);
        }
        Layer::Ls => {
            let layers = engine.layers()?;
            if json {
                return print_json(&layers);
            }
            list(&layers)?;
        }
        Layer::Inspect { chain } => return print_json(&engine.layer(&chain)?),
        Layer::Release { chain } => {
            let removed = engine.release_layer(&chain)?;
            print_gone(&removed, json)?;
            collect(engine);
        }
        Layer::Export { chain, output } => {
            let output = match output {
                Some(path) if path.as_os_str() != "-" => Output::Path(path),
                _ => Output::Stdout,
            };
            engine.export_layer(&chain, &output, &*style.renderer(), cancel)?;
            // On standard output there is the tar.
            if let (true, Output::Path(path)) = (json, output) {
                return print_json(&json!({"output": path, "layer": chain}));
            }
        }
        Layer::Rw(command) => return writable(engine, command, json, style, cancel),
    }
    Ok(ExitCode::SUCCESS)
}

fn writable(engine: &Engine, command: Rw, json: bool, style: Style, cancel: &Cancel) -> anyhow::Result<ExitCode> {
    match command {
        Rw::Create { name, parent, label, uid_map, gid_map, init } => {
            let ids = id_maps(uid_map, gid_map)?;
            let made = engine.create_rw_layer(&name, parent.as_deref(), label.as_deref(), ids, init)?;
            if json {
                return print_json(&made);
            }
            say(&made.name)?;
        }
        Rw::Ls => {
            let layers = engine.rw_layers()?;
            if json {
                return print_json(&layers);
            }
            list_writable(&layers)?;
        }
        Rw::Mount { name, dir } => {
            let dir = absolute(&dir)?;
            engine.mount_rw_layer(&name, &dir)?;
            if json {
                return print_json(&json!({"name": name, "dir": dir}));
            }
        }
        Rw::Umount { name } => {
            let dir = engine.umount_rw_layer(&name)?;
            if json {
                return print_json(&json!({"name": name, "dir": dir}));
            }
        }
        Rw::Changes { name } => {
            let changes = engine.rw_changes(&name)?;
            if json {
                return print_json(&changes);
            }
            let line =
                |change: &plies_engine::ChangeSummary| format!("{} {}\n", change.kind, format::safe(&change.path));
            print(&changes.iter().map(line).collect::<String>())?;
        }
        Rw::Commit { name } => {
            let layer = engine.commit_rw_layer(&name, &*style.renderer(), cancel)?;
            return print_layer(&layer, json);
        }
        Rw::Rm { names } => {
            let mut removed = Vec::new();
            for name in &names {
                removed.extend(engine.remove_rw_layer(name)?);
            }
            if json {
                print_json(&json!({"removed": names, "layers": removed}))?;
            } else {
                names.iter().try_for_each(|name| say(name))?;
                print_gone(&removed, false)?;
            }
            collect(engine);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The maps that were asked for; users and groups alike where only one was given.
pub(crate) fn id_maps(uids: Vec<IdRange>, gids: Vec<IdRange>) -> Result<Option<IdMaps>, plies_engine::IdMapError> {
    let (uids, gids) = match (uids.is_empty(), gids.is_empty()) {
        (true, true) => return Ok(None),
        (true, false) => (gids.clone(), gids),
        (false, true) => (uids.clone(), uids),
        (false, false) => (uids, gids),
    };
    IdMaps::new(uids, gids).map(Some)
}

fn print_layer(layer: &LayerSummary, json: bool) -> anyhow::Result<ExitCode> {
    if json {
        return print_json(layer);
    }
    say(&layer.chain_id.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn print_gone(removed: &[RemovedLayerSummary], json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&json!({"removed": removed})).map(drop);
    }
    removed
        .iter()
        .try_for_each(|layer| say(&format!("Removed layer {}  {}", layer.chain_id, format::size(layer.diff_bytes))))
}

fn list(layers: &[LayerSummary]) -> anyhow::Result<()> {
    let columns = [
        Column::Left("CHAIN ID"),
        Column::Left("PARENT"),
        Column::Right("DEPTH"),
        Column::Left("CREATED"),
        Column::Right("SIZE"),
        Column::Right("WITH PARENTS"),
    ];
    let rows = layers.iter().map(|layer| {
        vec![
            format::short_id(&layer.chain_id.hex()).to_owned(),
            layer.parent.map_or_else(String::new, |parent| format::short_id(&parent.hex()).to_owned()),
            layer.depth.to_string(),
            ago(Some(&layer.created)),
            format::size(layer.diff_bytes),
            format::size(layer.chain_bytes),
        ]
    });
    print(&format::table(&columns, rows))
}

fn list_writable(layers: &[RwSummary]) -> anyhow::Result<()> {
    let columns = [Column::Left("NAME"), Column::Left("PARENT"), Column::Left("CREATED"), Column::Left("MOUNTED ON")];
    let rows = layers.iter().map(|layer| {
        vec![
            layer.name.clone(),
            layer.parent.map_or_else(String::new, |parent| format::short_id(&parent.hex()).to_owned()),
            ago(Some(&layer.created)),
            layer.mounted_on.clone().unwrap_or_default(),
        ]
    });
    print(&format::table(&columns, rows))
}
